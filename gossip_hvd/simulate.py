"""The real engine on many virtual ranks of one process: experiments and tests without a cluster."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gossip_hvd.engine import Engine
from gossip_hvd.errors import StallError
from gossip_hvd.memory import PlainMemory
from gossip_hvd.methods import Method
from gossip_hvd.mixing import Array, dtype_of
from gossip_hvd.node import Cluster
from gossip_hvd.progress import Steps
from gossip_hvd.rounds import GRADIENTS, MOMENTUM, WEIGHTS
from gossip_hvd.seat import Seat
from gossip_hvd.segments import LARGEST_MESSAGE, Layout
from gossip_hvd.transport.faults import NONE, Faults
from gossip_hvd.transport.memory import Switchboard
from gossip_hvd.waits import Subject

Update = Callable[[int, Array], None]
"""The local step of one node: changes its flat weights in place."""

Gradient = Callable[[int, Array], Array]
"""The gradient of one node at its weights, averaged over its ranks."""

STALLS = 4
"""Waits that an error names."""

LocalStep = Callable[[Mapping[str, Array]], None]
"""An optimizer's step on the flat values of every slot."""


class Simulation:
    """All ranks of a job, taking turns.

    Args:
        cluster: the nodes.
        method: how they train together.
        layout: of the model; of one dtype, so that ``weights`` is one array a rank.
        seed: of the method's choices and of the order in which ranks and messages move.
        slots: payload slots to allocate beside the weights.
        options: further arguments of ``Engine`` and ``Seat`` (``timing``, ``staleness``,
            ``wire_dtype``, ``largest``, ``nan_policy``).
        faults: what befalls messages and ranks.
    """

    def __init__(
        self,
        cluster: Cluster,
        method: Method,
        layout: Layout,
        *,
        seed: int = 0,
        order: int = 0,
        slots: Sequence[str] = (GRADIENTS, MOMENTUM),
        timing: str = "atc",
        staleness: int = 0,
        wire_dtype: str | None = None,
        largest: int = LARGEST_MESSAGE,
        nan_policy: str = "raise",
        faults: Faults = NONE,
    ) -> None:
        self.cluster, self.layout = cluster, layout
        self._random = random.Random(order)
        self.board = Switchboard(cluster.size, seed=order, faults=faults)
        self._turns = [0] * cluster.size
        self._dtype = dtype_of(layout.fields[0].dtype)
        self.engines: list[Engine] = []
        for rank in range(cluster.size):
            memory = PlainMemory(
                (slot, np.zeros(layout.nbytes, np.uint8)) for slot in (WEIGHTS, *slots)
            )
            seat = Seat(
                cluster,
                rank,
                layout,
                self.board.wire(rank),
                memory,
                wire_dtype=wire_dtype,
                largest=largest,
                nan_policy=nan_policy,
            )
            self.engines.append(Engine(seat, method, seed=seed, timing=timing, staleness=staleness))

    def values(self, rank: int, slot: str = WEIGHTS) -> Array:
        """One rank's flat values of a slot, padding included; writable."""
        return self.engines[rank].seat.memory[slot].view(self._dtype)

    def nodes(self, slot: str = WEIGHTS) -> Array:
        """Every node's values, a row a node (of its first rank); a copy."""
        return np.stack([self.values(ranks[0], slot) for ranks in self.cluster.nodes])

    def fill(self, rows: Array, slot: str = WEIGHTS) -> None:
        """Give every rank its node's row."""
        for node, ranks in enumerate(self.cluster.nodes):
            for rank in ranks:
                self.values(rank, slot)[...] = rows[node]

    def step(self, update: Update | None = None) -> None:
        """One training step of every node."""
        for rank, engine in enumerate(self.engines):
            if update is not None:
                update(self.cluster.node_of(rank), self.values(rank))
            engine.reduced()
        self.run([engine.step() for engine in self.engines])

    def train(
        self,
        gradient: Gradient,
        local_step: LocalStep,
        rate: float | Sequence[float] | None = None,
        losses: Sequence[float] | None = None,
    ) -> None:
        """One training step of every node, each hook at the moment at which an adapter calls it.

        Args:
            gradient: gives every node's gradient.
            local_step: of the optimizer.
            rate: the learning rate, for methods that need it.
            losses: one a node, for methods that need it.
        """
        for rank, engine in enumerate(self.engines):
            node = self.cluster.node_of(rank)
            self.values(rank, GRADIENTS)[...] = gradient(node, self.values(rank))
            if rate is not None:
                engine.learn(rate)
            engine.loss = None if losses is None else losses[node]
        early = self.engines[0].when == "reduction"
        for engine in self.engines:
            engine.reduced()
        if early:
            self.run([engine.step() for engine in self.engines])
        for rank, engine in enumerate(self.engines):
            engine.before_step()
            slots = engine.seat.memory.items()
            local_step({name: self.values(rank, name) for name, _ in slots})
        self.run([engine.step() for engine in self.engines])

    def drain(self) -> None:
        """Run what is owed and land what is in flight."""
        self.run([engine.drain() for engine in self.engines])

    def average(self, slot: str = WEIGHTS) -> None:
        """The exact mean everywhere."""
        self.run([engine.average(slot) for engine in self.engines])

    def run(self, operations: Sequence[Steps], patience: int = 500) -> None:
        """Poll the ranks' operations in a random order until all are over.

        Args:
            operations: one a rank.
            patience: how many turns of each rank may pass in which nothing moves.

        Raises:
            StallError: names who waits for whom.
        """
        going = dict(enumerate(operations))
        waits: dict[int, Subject] = {}
        last, idle, size = -1, 0, self.cluster.size
        for turn in itertools.count():
            if not going or idle > patience:
                break
            rank = self._random.choice(list(going))
            self._turns[rank] += 1
            if not self.board.faults.loses_turn(rank, self._turns[rank]):
                flight = next(going[rank], None)
                if flight is None:
                    del going[rank]
                    last = -1
                else:
                    waits[rank] = flight
            if turn % size == 0:
                moved = sum(engine.seat.record.count for engine in self.engines)
                idle, last = (idle + 1 if moved == last else 0), moved
        if going:
            told = [
                waits[rank].facts().text if rank in waits else f"rank {rank} stands still"
                for rank in going
            ]
            raise StallError(f"nothing moves in the simulation: {'; '.join(told[:STALLS])}")
