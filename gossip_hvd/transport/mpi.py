"""MPI: how it is started, a wire over its point-to-point, and small collectives that never hang.

The only importer of mpi4py. Open MPI's own defaults are kept but for two, each found by
measurement on slow links and each left alone where the user has set it (see ``TUNING``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gossip_hvd.errors import ConfigError, PeerLostError
from gossip_hvd.transport import PAUSE, Bytes
from gossip_hvd.transport.group import Group
from gossip_hvd.waits import Facts, waiting

if TYPE_CHECKING:
    from mpi4py import MPI

TUNING = {
    # No PUT: its control messages queue behind bulk data of the other direction.
    "OMPI_MCA_btl_tcp_flags": "9",
    # Small socket buffers: what is in them can no longer be overtaken by what is needed first.
    "OMPI_MCA_btl_tcp_sndbuf": "65536",
    # Ranks that wait give their core away; several ranks often share one.
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def start() -> Any:
    """Import and so initialise MPI with full thread support; returns the MPI module.

    Raises:
        ConfigError: where MPI came up, or was brought up before us, without thread support.
    """
    for name, value in TUNING.items():
        os.environ.setdefault(name, value)
    import mpi4py

    mpi4py.rc.thread_level = "multiple"
    from mpi4py import MPI

    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ConfigError(
            "MPI runs without MPI_THREAD_MULTIPLE, which Horovod's and our own threads need: "
            "call init() before anything else starts MPI, and use an MPI built with threads."
        )
    return MPI


class _Due(NamedTuple):
    """A receive under way; holds the request, whose identity is its key."""

    request: MPI.Request
    peer: int
    tag: int
    nbytes: int


class MpiWire:
    """Point-to-point messages on a communicator of our own; see ``transport.Wire``."""

    def __init__(self, comm: MPI.Comm) -> None:
        from mpi4py import MPI

        self._comm, self._mpi = comm, MPI
        self.rank = comm.Get_rank()
        largest: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
        self._largest_tag = int(largest)
        self._due: dict[int, _Due] = {}

    def send(self, peer: int, tag: int, data: Bytes) -> MPI.Request:
        """Start to send."""
        return self._comm.Isend([data, self._mpi.BYTE], peer, self._checked(tag))

    def receive(self, peer: int, tag: int, data: Bytes) -> MPI.Request:
        """Start to receive exactly ``data.nbytes``."""
        request = self._comm.Irecv([data, self._mpi.BYTE], peer, self._checked(tag))
        self._due[id(request)] = _Due(request, peer, tag, data.nbytes)
        return request

    def _checked(self, tag: int) -> int:
        if tag > self._largest_tag:
            raise ConfigError(
                f"this MPI's tags end at {self._largest_tag}, and the model needs tag {tag}: it is "
                "cut into too many messages. Use larger chunk_bytes, or fewer segments."
            )
        return tag

    def test(self, handles: list[MPI.Request]) -> list[int]:
        """Positions of the requests that have just completed."""
        statuses: list[MPI.Status] = []
        try:
            done = self._mpi.Request.Testsome(handles, statuses) or []
            for position, status in zip(done, statuses, strict=False):
                due = self._due.pop(id(handles[position]), None)
                if due is not None and status.Get_count(self._mpi.BYTE) != due.nbytes:
                    raise PeerLostError(
                        f"rank {self.rank} expected {due.nbytes} bytes from rank {due.peer} (tag "
                        f"{due.tag}) and got {status.Get_count(self._mpi.BYTE)}: both ends differ "
                        "in what they exchange. Give every rank the same program and settings."
                    )
            return done
        except self._mpi.Exception as error:
            raise PeerLostError(
                f"rank {self.rank}: MPI reports a failed transfer: {error.Get_error_string()}. "
                "A peer has ended or its link is gone, or both ends differ in what they exchange."
            ) from error


class Post:
    """Letters of any length between ranks, on a communicator of its own; never blocks."""

    def __init__(self, mpi: Any, comm: MPI.Intracomm) -> None:
        self._mpi, self._comm = mpi, comm
        self._sending: list[tuple[MPI.Request, bytes]] = []

    def send(self, peer: int, letter: bytes) -> None:
        """Start to send; the letter is kept until it has left."""
        self._sending = [pair for pair in self._sending if not pair[0].Test()]
        request = self._comm.Isend([letter, self._mpi.BYTE], peer)
        if not request.Test():  # What is small has left at once.
            self._sending.append((request, letter))

    def arrived(self) -> bool:
        """Whether there is a letter to receive; changes nothing."""
        return bool(self._comm.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG))

    def receive(self) -> tuple[int, bytes] | None:
        """The sender and the text of one letter that has arrived."""
        status = self._mpi.Status()
        found = self._comm.Improbe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, status)
        if found is None:
            return None
        letter = bytearray(status.Get_count(self._mpi.BYTE))
        found.Recv([letter, self._mpi.BYTE])
        return status.Get_source(), bytes(letter)

    def free(self) -> None:
        """Give the communicator back once all letters have left; collective."""
        self._mpi.Request.Waitall([request for request, _ in self._sending])
        self._comm.Free()


class World:
    """All ranks of the job: who they are, and collectives that are watched.

    Args:
        mpi: the MPI module, from ``start``.
        comm: the ranks that take part; duplicated, so that nobody else's messages mix with ours.
    """

    def __init__(self, mpi: Any, comm: MPI.Intracomm) -> None:
        self._mpi = mpi
        self._wires: list[MPI.Intracomm] = []
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        with waiting(self._facts("init")):
            self._find(comm)

    def _find(self, comm: MPI.Intracomm) -> None:
        """Who shares a host with whom."""
        mpi = self._mpi
        self.comm: MPI.Intracomm = comm.Dup()
        local = self.comm.Split_type(mpi.COMM_TYPE_SHARED, self.rank)
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()
        # Arrays: mpi4py would send and receive plain Python values as pickles.
        leader, leaders = np.array([self.rank]), np.empty(self.size, np.int64)
        local.Bcast(leader, 0)
        self.comm.Allgather(leader, leaders)
        self.hosts = [str(host) for host in leaders]
        cross = self.comm.Split(self.local_rank, self.rank)
        self.cross_rank, self.cross_size = cross.Get_rank(), cross.Get_size()
        local.Free()
        cross.Free()

    def wire(self) -> MpiWire:
        """A wire with a communicator of its own; collective."""
        self._wires.append(self.comm.Dup())
        return MpiWire(self._wires[-1])

    def post(self) -> Post:
        """Letters on a communicator of their own; collective."""
        return Post(self._mpi, self.comm.Dup())

    def group(self) -> Group:
        """Collectives on communicators of their own; collective."""
        return Group(self._mpi, self.comm.Dup(), self.hosts)

    def split(self, color: int) -> MPI.Comm:
        """The communicator of the ranks that give the same color; collective."""
        return self.comm.Split(color, self.rank)

    def allgather(self, data: bytes, what: str) -> list[bytes]:
        """Every rank's ``data``, by rank."""
        mine = np.frombuffer(data, np.uint8)
        sizes = np.empty(self.size, np.int64)
        self._wait(self.comm.Iallgather(np.array([mine.size], np.int64), sizes), what)
        total = np.empty(int(sizes.sum()), np.uint8)
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        self._wait(
            self.comm.Iallgatherv(mine, [total, sizes.tolist(), starts.tolist(), self._mpi.BYTE]),
            what,
        )
        return [total[a : a + n].tobytes() for a, n in zip(starts, sizes, strict=True)]

    def broadcast(self, data: Bytes, root: int, what: str) -> None:
        """Overwrite ``data``, of equal size on every rank, with the root's."""
        step = 1 << 30
        for start in range(0, data.size, step):
            part = [data[start : start + step], self._mpi.BYTE]
            self._wait(self.comm.Ibcast(part, root), what)

    def reduce(self, values: NDArray[Any], op: str, what: str) -> None:
        """Overwrite an array, of equal shape on every rank, with its reduction over all ranks.

        Args:
            values: contiguous, of a dtype that MPI knows.
            op: ``"SUM"``, ``"MIN"``, ``"MAX"`` or ``"PROD"``.
            what: named in the error of a stall.
        """
        operation = getattr(self._mpi, op)
        self._wait(self.comm.Iallreduce(self._mpi.IN_PLACE, values, operation), what)

    def sum(self, values: Sequence[float], what: str) -> NDArray[np.float64]:
        """The sum over all ranks of a few numbers, added in the order of ranks everywhere."""
        mine = np.asarray(values, np.float64)
        every = np.empty((self.size, mine.size), np.float64)
        self._wait(self.comm.Iallgather(mine, every), what)
        total: NDArray[np.float64] = every.sum(axis=0)
        return total

    def barrier(self, what: str) -> None:
        """Return when every rank has come here."""
        self._wait(self.comm.Ibarrier(), what)

    def abort(self, code: int) -> None:
        """End the whole job now."""
        self._mpi.COMM_WORLD.Abort(code)

    def free(self) -> None:
        """Give all communicators back; collective."""
        if not self._mpi.Is_finalized():
            for comm in (*self._wires, self.comm):
                comm.Free()

    def _facts(self, what: str) -> Facts:
        # At the end every rank waits for all others, and has left as far as they are concerned.
        others = () if what == "shutdown" else (r for r in range(self.size) if r != self.rank)
        text = f"rank {self.rank} waits for all {self.size} ranks at: {what}"
        return Facts(text, tuple(others))

    def _wait(self, request: MPI.Request, what: str) -> None:
        if request.Test():
            return
        with waiting(self._facts(what)) as wait:
            while not request.Test():
                wait.check()
                # A collective that all have reached is over in microseconds.
                time.sleep(0 if time.monotonic() - wait.since < PAUSE else PAUSE / 4)
