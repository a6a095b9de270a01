"""Every row of the methods' table on MPI: the bits of the memory wire, on real ranks."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from rank import Rank
from ranks import Job, on_ranks
from rows import (
    LAYOUT,
    OPTIMIZERS,
    ROWS,
    SEED,
    SLOTS,
    TABLE,
    Quadratic,
    Row,
    losses_at,
    rate_at,
    train,
)

from gossip_hvd import session
from gossip_hvd.engine import Engine
from gossip_hvd.memory import PlainMemory
from gossip_hvd.node import Cluster
from gossip_hvd.progress import ThreadProgress, drive
from gossip_hvd.rounds import GRADIENTS, WEIGHTS
from gossip_hvd.seat import Seat
from gossip_hvd.simulate import Simulation
from gossip_hvd.transport import Wire

pytestmark = pytest.mark.skipif(find_spec("torch") is None, reason="starts ranks with PyTorch")

STEPS = 6
"""Enough for a period of three, and for schedules that change at four."""


class OneRank:
    """This rank's engine on a real wire, trained as ``Simulation.train`` trains all of them."""

    def __init__(self, cluster: Cluster, rank: int, wire: Wire, row: Row, timing: str) -> None:
        shape = LAYOUT.nbytes
        memory = PlainMemory((slot, np.zeros(shape, np.uint8)) for slot in (WEIGHTS, *SLOTS))
        self.row, self.node = row, cluster.node_of(rank)
        self.nodes = len(cluster.nodes)
        late = timing == "awc" and self.nodes > 1
        self.engine = Engine(
            Seat(cluster, rank, LAYOUT, wire, memory),
            row.method.fitted(row.optimizer),
            seed=SEED,
            timing=timing,
            progress=ThreadProgress() if late else None,
        )
        self.values = {slot: memory[slot].view(np.float64) for slot in (WEIGHTS, *SLOTS)}
        self.values[WEIGHTS][...] = np.linspace(-1, 1, self.values[WEIGHTS].size)

    def train(self, task: Quadratic, t: int) -> None:
        engine, rate = self.engine, rate_at(t)
        self.values[GRADIENTS][...] = task.of(self.node, self.values[WEIGHTS])
        engine.learn(rate)
        engine.loss = losses_at(t, self.nodes)[self.node]
        early = engine.when == "reduction"
        engine.reduced()
        if early:
            drive(engine.step())
        engine.before_step()
        OPTIMIZERS[self.row.optimizer](rate)(self.values)
        drive(engine.step())


@on_ranks(
    [
        *(Job(ranks) for ranks in (1, 2, 3, 4, 5, 8)),
        Job(4, "node", 2),
        Job(5, "node", 2),
    ]
)
def test_every_method_on_mpi_is_bit_for_bit_the_one_in_memory(me: Rank) -> None:
    cluster = Cluster(tuple(tuple(ranks) for ranks in me.nodes))
    nodes, wire = len(cluster.nodes), session.current().world.wire()
    ran = [(name, timing) for name, timing, n in TABLE if n == nodes]
    assert {ROWS[name].method.name for name, _ in ran} == {r.method.name for r in ROWS.values()}
    for name, timing in ran:
        row, task = ROWS[name], Quadratic.draw(nodes, 1.0)
        mine = OneRank(cluster, me.rank, wire, row, timing)
        seen = []
        for t in range(STEPS):
            mine.train(task, t)
            seen.append({slot: values.tobytes() for slot, values in mine.values.items()})
        drive(mine.engine.drain())
        seen.append({slot: values.tobytes() for slot, values in mine.values.items()})
        state = mine.engine.state
        mine.engine.close()
        everyone = me.gather((seen, state))
        if me.rank:
            continue  # one simulation of all ranks is enough
        known = simulated(cluster, row, task, timing)
        for rank, (values, end) in enumerate(everyone):
            assert values == known[rank][0], (name, timing, rank)
            assert end == known[rank][1], (name, timing, rank)
    me.settle()


def simulated(
    cluster: Cluster, row: Row, task: Quadratic, timing: str
) -> list[tuple[object, object]]:
    """By rank, every step's bytes and the last state, of the same training in one process."""
    method = row.method.fitted(row.optimizer)
    sim = Simulation(cluster, method, LAYOUT, seed=SEED, slots=SLOTS, timing=timing)
    start = np.linspace(-1, 1, sim.values(0).size)
    sim.fill(np.tile(start, (len(cluster.nodes), 1)))
    seen: list[list[dict[str, bytes]]] = [[] for _ in sim.engines]

    def look() -> None:
        for rank, log in enumerate(seen):
            log.append({slot: sim.values(rank, slot).tobytes() for slot in (WEIGHTS, *SLOTS)})

    for t in range(STEPS):
        train(sim, row, task, t)
        look()
    sim.drain()
    look()
    return [(log, engine.state) for log, engine in zip(seen, sim.engines, strict=True)]
