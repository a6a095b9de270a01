"""One training step as a small state machine: rounds owed, posted, polled, landed.

Every operation is a generator of the flights it waits for, so that a caller may block on it
(``progress.drive``), poll it from a hook, or, in a simulation, take turns with other ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from copy import copy

import numpy as np

from gossip_hvd.errors import ConfigError
from gossip_hvd.flight import Flight
from gossip_hvd.lowering import Posted
from gossip_hvd.memory import Memory
from gossip_hvd.methods.contract import Context, Method, Moment
from gossip_hvd.mixing import dtype_of
from gossip_hvd.progress import CallerProgress, Progress, Steps
from gossip_hvd.rounds import WEIGHTS, Round, damped, exact_mean
from gossip_hvd.seat import Lane, Seat
from gossip_hvd.staleness import damping
from gossip_hvd.transport import Bytes
from gossip_hvd.vote import Vote
from gossip_hvd.waits import Subject


class Engine:
    """Runs one method's rounds for one model on one rank.

    Args:
        seat: this rank's place, wire and memory.
        method: decides who meets whom.
        seed: of every random choice, equal on all ranks.
        timing: ``"atc"``: exchange after the local step, x ← Σ W (x − γd); ``"awc"``: exchange
            under the next forward and backward, x ← Σ W x − γ d(x).
        staleness: under AWC, for how many steps a flight that has not arrived is let be. Where the
            method is ``linear``, the next round is posted beside it; others owe the next.
        progress: moves late flights; by default the caller does.

    Attributes:
        number: rounds posted so far.
        owed: completed gradient reductions whose round has not been posted. A round counts
            reductions, not optimizer steps: a node that skips a step still owes its peers.
        loss: of this node, equal on all its ranks; for methods with ``needs_loss``.
        begun: whether the method's own arrays have their first values.
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
        self.begun = False
        for names, size, arrays in (
            (method.arrays, seat.share.nbytes, seat.arrays),
            (method.replicas, seat.layout.nbytes, seat.replicas),
        ):
            for name in names:
                arrays.setdefault(name, np.zeros(size, np.uint8))
        # How many rounds may be under way beside the newest; others are owed.
        self._beside = staleness if method.linear else 0
        while len(seat.lanes) <= self._beside:
            seat.lanes.append(Lane())
        self._stepping: int | None = None
        self._sequence = 0
        self._progress: Progress = progress or CallerProgress()
        self._flying: list[Flight] = []

    @property
    def alone(self) -> bool:
        """True with one node: nothing is ever exchanged."""
        return len(self.seat.cluster.nodes) == 1

    @property
    def in_flight(self) -> bool:
        """True while an exchange is under way behind the computation."""
        return bool(self._flying)

    @property
    def posted(self) -> Posted | None:
        """What the exchange under way has sent; None where there is none."""
        return self._flying[-1].posted if self._flying else None

    @property
    def credit(self) -> int:
        """Rounds that may be owed when a step is over."""
        return self.staleness - self._beside

    @property
    def when(self) -> Moment:
        """The moment of the round that the next reduction will owe: ``step`` is called then."""
        return self.method.when(self.number + self.owed)

    def learn(self, rates: float | Sequence[float]) -> None:
        """Report the learning rate of the step to come: one for all, or one a field."""
        uniform = isinstance(rates, int | float) or len(set(rates)) == 1
        first = rates if isinstance(rates, int | float) else rates[0]
        self.seat.rates = float(first) if uniform else rates

    def reduced(self) -> None:
        """A gradient reduction of the node is complete: one more round is owed."""
        if not self.begun or self.method.begins(self.number + self.owed):
            self._begin(self.number + self.owed)
        self.owed += 1

    def before_step(self) -> None:
        """The optimizer is about to step."""
        self._stepping = max(0, self.number + self.owed - 1)
        self._hook("before_step")

    def poll(self) -> None:
        """Move the exchange in flight a little, where no thread does."""
        if isinstance(self._progress, CallerProgress):
            for flight in self._flying:
                self._progress.arrived(flight)

    def step(self) -> Steps:
        """After a local step, or a reduction, or where one was skipped: run what is owed."""
        self._hook("after_step")
        yield from self._exchange()
        self._hook("end_step")
        self._stepping = None

    def _exchange(self) -> Steps:
        """Run the rounds that are owed, as far as timing and staleness demand."""
        while self.owed:
            if self._flying and self.owed <= self.credit:
                # A round before the local step cannot wait: its result is needed now.
                patient = self.method.when(self.number) == "step"
                if patient and not (yield from self._arrived()):
                    return
            yield from self._turn()

    def drain(self) -> Steps:
        """Run every round that is owed and land the one in flight."""
        while self.owed:
            yield from self._turn()
        yield from self._bring_in(self._flying)

    def discard(self) -> Steps:
        """Run what is owed and in flight, since peers wait for it; keep the weights as they are.

        For weights that are set from outside.
        """
        memory, slots = self.seat.memory, self.method.writes
        memory.load(slots)
        kept = {slot: memory[slot].copy() for slot in slots}
        yield from self.drain()
        for slot, values in kept.items():
            memory[slot][...] = values
        memory.save(slots)
        self.state, self.begun = self.method.levelled(self.state), False

    def average(self, slot: str = WEIGHTS) -> Steps:
        """Replace a slot by its exact mean over nodes, the same bits on every rank."""
        yield from self.drain()
        self.seat.memory.load([slot])
        # Only the method knows how its nodes' weights count in their mean.
        method = self.method if slot == WEIGHTS else Method()
        yield from self._mean(self.seat, slot, method)
        self.state = method.levelled(self.state)
        self.seat.memory.save([slot])

    def deviation(self, memory: Memory) -> Steps:
        """Replace the weights in ``memory``, a copy of this node's, by their mean over nodes."""
        assert not self._flying, "drain first: its memory is in use"
        assert not self.owed, "drain first: peers wait for a round"
        seat = copy(self.seat)
        seat.memory = memory
        yield from self._mean(seat, WEIGHTS, Method())

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
        """Count on where a drained engine for the same ranks and wire has stopped.

        The method's numbers go on too, unless they are kept by segment and segments have changed.
        Its arrays begin again, since they were as large as the model before.
        """
        self.number, self.loss, self._sequence = before.number, before.loss, before._sequence
        if before.state.segments == self.state.segments:
            self.state = before.state

    def flies_late(self, plan: Round) -> bool:
        """Whether a round travels under the next step: an exact mean, or two stages, cannot."""
        return self.timing == "awc" and not plan.blocking and len(plan.stages) < 2

    def post_again(self, posted: Posted) -> None:
        """Send what the last round had sent when its job was stopped; all ranks must call."""
        assert not self._flying, "drain first"
        plan = self._plan(self.number - 1)
        sequence = self._next_sequence()
        flight = Flight(self.seat, self.method, self.state, plan, sequence, late=True, again=posted)
        self._leave(flight)

    def close(self) -> None:
        """Stop moving bytes; call it after ``drain``."""
        self._progress.close()

    # One round -------------------------------------------------------------------------------

    def _turn(self) -> Steps:
        """Merge what is under way, but for what is let be, and post the next round.

        The next round follows cell by cell where it can: a cell whose last exchange is over has
        the values that it will be sent with, whatever the others still wait for.
        """
        ahead: Flight | None = None
        if self._beside:
            yield from self._bring_in((yield from self._due()))
        elif self._flying:
            ahead = self._land(self._flying[0])
            if ahead.own_note.size:  # the next plan may depend on notes
                yield from self._merge(ahead)
        self.owed -= 1
        context = self._context()
        self.state = self.method.observe(self.state, self.number, context)
        plan = self._plan(self.number)
        self.number += 1
        late = self.flies_late(plan)
        if not late:
            yield from self._bring_in(self._flying)
            if ahead is not None:
                yield from self._merge(ahead)
                yield from self._settle(ahead)
        self.seat.memory.load(self._slots if ahead is None else self.method.reads)
        following = Flight(
            self.seat,
            self.method,
            self.state,
            plan,
            self._next_sequence(),
            late=late,
            context=context,
            behind=ahead,
            lane=self._free_lane(),
        )
        if not late:
            while not following.poll():
                yield following
            self._finish(following)
            self.seat.memory.save(self.method.writes)
            return
        if ahead is not None:
            yield from self._merge(ahead, following)
        self._leave(following)
        if ahead is not None:
            yield from self._settle(ahead)

    def _plan(self, number: int) -> Round:
        plan = self.method.plan(self.state, number, self.seat.node)
        return damped(plan, damping(self._beside))

    def _leave(self, flight: Flight) -> None:
        """Let a flight travel under what comes next."""
        self._flying.append(flight)
        self._progress.take(flight)

    def _land(self, flight: Flight) -> Flight:
        """Take back a flight under way, to merge this rank's share of it cell by cell."""
        self._progress.release(flight)
        self._flying.remove(flight)
        self.seat.memory.load(self.method.writes)
        flight.land()
        if not flight.own_note.size:
            self._finish(flight)
        return flight

    def _bring_in(self, flights: Sequence[Flight]) -> Steps:
        """Land and merge these, the oldest first."""
        for flight in tuple(flights):
            yield from self._merge(self._land(flight))
            yield from self._settle(flight)

    def _due(self) -> Generator[Subject, None, list[Flight]]:
        """What has arrived on all ranks of the node, or is too old to be let be."""
        arrived = yield from self._arrived()
        oldest = self.number - self._beside
        return [f for f in self._flying if f in arrived or f.round.number < oldest]

    def _arrived(self) -> Generator[Subject, None, list[Flight]]:
        """What has arrived on all ranks of the node."""
        found = [self._progress.arrived(flight) for flight in self._flying]
        if self.seat.siblings and self._flying:
            vote = Vote(self.seat, self._sequence + 1, found)
            while not vote.poll():
                self.poll()
                yield vote
            found = vote.unanimous
        return [flight for flight, yes in zip(self._flying, found, strict=True) if yes]

    def _free_lane(self) -> Lane:
        taken = {flight.lane for flight in self._flying}
        return next(lane for lane in self.seat.lanes if lane not in taken)

    def _merge(self, flight: Flight, following: Flight | None = None) -> Steps:
        """Wait until this rank's share is merged; the next flight follows close behind."""
        while not flight.merged:
            flight.poll()
            self.poll()
            if following is not None:
                following.follow()
                following.poll()
            if not flight.merged:
                yield flight
        if following is not None:
            following.follow()
        self._finish(flight)

    def _settle(self, merged: Flight) -> Steps:
        """Wait until the node's ranks have each other's shares."""
        while not merged.poll():
            self.poll()
            yield merged
        self.seat.memory.save(self.method.writes)

    def _finish(self, flight: Flight) -> None:
        """Once: let the method draw its conclusions from the notes."""
        if flight.finished:
            return
        flight.finished = True
        self.state = self.method.finish(self.state, flight.round, flight.own_note, flight.notes)

    def _mean(self, seat: Seat, slot: str, method: Method) -> Steps:
        plan = exact_mean(self.number, seat.node, len(seat.cluster.nodes), slot)
        flight = Flight(seat, method, self.state, plan, self._next_sequence())
        while not flight.poll():
            yield flight

    @property
    def _slots(self) -> tuple[str, ...]:
        return (*self.method.writes, *self.method.reads)

    def _begin(self, number: int) -> None:
        self.begun = True
        for array in (*self.seat.arrays.values(), *self.seat.replicas.values()):
            array[...] = 0
        if "begin" in self.method.hooks and not self.alone:
            self.seat.memory.load(self._slots)
            for slots in self.seat.share_views():
                self.method.begin(self.state, number, slots)

    def _hook(self, name: str) -> None:
        """Give whole slots to the method; with one node it has nothing to correct."""
        if self._stepping is None or name not in self.method.hooks or self.alone:
            return
        self._context()
        self.seat.memory.load(self._slots)
        getattr(self.method, name)(self.state, self._stepping, self.seat.whole_views())
        self.seat.memory.save(self.method.writes)

    def _context(self) -> Context:
        """What was reported, or an error that says what must be."""
        rates = self.seat.rates
        if self.method.needs_rate and rates is None:
            raise ConfigError(
                f"method {self.method.name!r} needs the learning rate, and nobody has reported "
                "it: call engine.learn(rates) before each step (the optimizer wrappers do)."
            )
        if self.method.needs_loss and self.loss is None:
            raise ConfigError(
                f"method {self.method.name!r} needs the loss: call "
                "optimizer.gossip.report_loss(loss) before backward (Keras's fit tells it itself)."
            )
        rate = rates if rates is None or isinstance(rates, float) else max(rates)
        return Context(rate, self.loss)

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence
