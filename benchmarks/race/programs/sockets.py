"""The wire's limit: one model out of every host and one in, both at once, over plain TCP sockets.

Every rank carries its share, as in gossip. Transfer k goes from host i to host i+o and o cycles
through 1 … n−1, so that pairs which exchange with each other are among them.
"""

import os
import socket
import statistics
import threading
import time

from mpi4py import MPI

from benchmarks.race.model import Lane

TRANSFERS = 9

lane = Lane.parse()
world = MPI.COMM_WORLD
local = lane.asked.ranks_per_host
hosts = world.size // local
address = socket.gethostbyname(socket.gethostname())
with socket.create_server((address, 0), backlog=hosts) as server:
    places = world.allgather(server.getsockname())
    to: dict[int, socket.socket] = {}
    come: dict[int, socket.socket] = {}

    def accept() -> None:
        for _ in range(hosts - 1):
            connection, _ = server.accept()
            come[int.from_bytes(connection.recv(4), "little")] = connection

    door = threading.Thread(target=accept)
    door.start()
    for host in range(hosts):
        if host != lane.host:
            to[host] = socket.create_connection(places[host * local + lane.rank % local])
            to[host].sendall(lane.host.to_bytes(4, "little"))
    door.join()


def transfer(nbytes: int, offset: int) -> float:
    """Seconds until every rank has sent and received so many bytes."""
    there, here = (lane.host + offset) % hosts, (lane.host - offset) % hosts
    data, room = bytes(nbytes), memoryview(bytearray(nbytes))
    world.Barrier()
    begin = time.monotonic()
    sender = threading.Thread(target=to[there].sendall, args=(data,))
    sender.start()
    got = 0
    while got < nbytes:
        got += come[here].recv_into(room[got:])
    sender.join()
    end = time.monotonic()
    return float(max(world.allgather(end)) - min(world.allgather(begin)))


found = {}
for name, nbytes in (("float32", lane.asked.bytes), ("16-bit", lane.asked.bytes // 2)):
    offsets = [1 + k % (hosts - 1) for k in range(TRANSFERS + 1)]
    times = [transfer(nbytes // local, offset) for offset in offsets][1:]
    found[name] = {"seconds": times, "median": statistics.median(times)}
lane.save({"transfers": found, "about": {"kernel": os.uname().release}})
