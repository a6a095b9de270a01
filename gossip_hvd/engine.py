"""One training step as a small state machine: rounds owed, posted, polled, landed.

Every operation is a generator of the flights it waits for, so that a caller may block on it
(``progress.drive``), poll it from a hook, or, in a simulation, take turns with other ranks.
"""

from __future__ import annotations

from copy import copy

import numpy as np

from gossip_hvd.errors import ConfigError
from gossip_hvd.flight import Flight, Seat
from gossip_hvd.memory import Memory
from gossip_hvd.methods.contract import Method
from gossip_hvd.mixing import dtype_of
from gossip_hvd.progress import CallerProgress, Progress, Steps
from gossip_hvd.rounds import WEIGHTS, exact_mean
from gossip_hvd.transport import Bytes


class Engine:
    """Runs one method's rounds for one model on one rank.

    Args:
        seat: this rank's place, wire and memory.
        method: decides who meets whom.
        seed: of every random choice, equal on all ranks.
        timing: ``"atc"``: exchange after the local step, x ← Σ W (x − γd); ``"awc"``: exchange
            under the next forward and backward, x ← Σ W x − γ d(x).
        staleness: under AWC, for how many steps a flight that has not arrived is let be.
        progress: moves late flights; by default the caller does.

    Attributes:
        number: rounds posted so far.
        owed: completed gradient reductions whose round has not been posted. A round counts
            reductions, not optimizer steps: a node that skips a step still owes its peers.
    """

    def __init__(
        self,
        seat: Seat,
        method: Method,
        *,
        seed: int = 0,
        timing: str = "atc",
        staleness: int = 0,
        progress: Progress | None = None,
    ) -> None:
        if timing not in method.timings:
            raise ConfigError(
                f"timing={timing!r} does not fit method {method.name!r}, which allows "
                f"{' and '.join(method.timings)}."
            )
        self.seat, self.method = seat, method
        self.timing, self.staleness = timing, staleness
        self.state = method.start(len(seat.cluster.nodes), len(seat.layout.segments), seed)
        self.number = self.owed = 0
        self.loss: float | None = None
        self._sequence = 0
        self._progress: Progress = progress or CallerProgress()
        self._flying: Flight | None = None

    @property
    def alone(self) -> bool:
        """True with one node: nothing is ever exchanged."""
        return len(self.seat.cluster.nodes) == 1

    @property
    def in_flight(self) -> bool:
        """True while an exchange is under way behind the computation."""
        return self._flying is not None

    def reduced(self) -> None:
        """A gradient reduction of the node is complete: one more round is owed."""
        self.owed += 1

    def step(self) -> Steps:
        """Run the rounds that are owed, as far as timing and staleness demand."""
        while self.owed:
            if self._flying is not None:
                patient = self.owed <= self.staleness
                if patient and not self._progress.arrived(self._flying):
                    return
                yield from self._land()
            yield from self._round()

    def drain(self) -> Steps:
        """Run every round that is owed and land the one in flight."""
        while self.owed or self._flying is not None:
            yield from self._land()
            if self.owed:
                yield from self._round()

    def discard(self) -> Steps:
        """Let the exchange in flight arrive and forget it; for weights set from outside."""
        if self._flying is not None:
            while not self._progress.arrived(self._flying):
                yield self._flying
            self._flying = None

    def average(self, slot: str = WEIGHTS) -> Steps:
        """Replace a slot by its exact mean over nodes, the same bits on every rank."""
        if slot == WEIGHTS:
            yield from self.drain()
        self.seat.memory.load([slot])
        yield from self._mean(self.seat, slot)
        self.seat.memory.save([slot])

    def deviation(self, memory: Memory) -> Steps:
        """Fill ``memory``'s weights with the mean over nodes, for a consensus distance."""
        seat = copy(self.seat)
        seat.memory = memory
        yield from self._mean(seat, WEIGHTS)

    def squared_deviation(self, mean: Bytes) -> float:
        """This rank's share of ‖x − mean‖², in float64."""
        total = 0.0
        share = self.seat.share
        for start, stop, dtype in self.seat.layout.runs:
            span = slice(max(start, share.start), min(stop, share.stop))
            if span.start < span.stop:
                kind = dtype_of(dtype)
                own = self.seat.memory[WEIGHTS][span].view(kind).astype(np.float64)
                own -= mean[span].view(kind).astype(np.float64)
                total += float(own @ own)
        return total

    def resume(self, before: Engine) -> None:
        """Count on where a drained engine for the same ranks and wire has stopped."""
        self.number, self.loss, self._sequence = before.number, before.loss, before._sequence

    def close(self) -> None:
        """Stop moving bytes; call it after ``drain``."""
        self._progress.close()

    # One round -------------------------------------------------------------------------------

    def _round(self) -> Steps:
        self.owed -= 1
        me, slots = self.seat.node, (*self.method.writes, *self.method.reads)
        plan = self.method.plan(self.state, self.number, me)
        self.number += 1
        late = self.timing == "awc" and not plan.blocking
        self.seat.memory.load(slots)
        flight = Flight(
            self.seat,
            self.method,
            self.state,
            plan,
            self._next_sequence(),
            late=late,
            loss=self.loss,
        )
        if late:
            self._flying = flight
            self._progress.take(flight)
            return
        while not flight.poll():
            yield flight
        self._finish(flight)

    def _land(self) -> Steps:
        flight = self._flying
        if flight is None:
            return
        while not self._progress.arrived(flight):
            yield flight
        self._flying = None
        self.seat.memory.load(self.method.writes)
        flight.land()
        while not flight.poll():
            yield flight
        self._finish(flight)

    def _finish(self, flight: Flight) -> None:
        self.seat.memory.save(self.method.writes)
        self.state = self.method.finish(self.state, flight.round, flight.own_note, flight.notes)

    def _mean(self, seat: Seat, slot: str) -> Steps:
        plan = exact_mean(self.number, seat.node, len(seat.cluster.nodes), slot)
        flight = Flight(seat, Method(), self.state, plan, self._next_sequence())
        while not flight.poll():
            yield flight

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence
