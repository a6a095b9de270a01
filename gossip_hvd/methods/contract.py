"""The contract of every method: plan a round, apply what arrived; no I/O, no clock, no counter.

A method is a frozen dataclass of its options. All that changes while it runs is in its ``State``,
a frozen dataclass of plain numbers, and in named arrays that the engine keeps for it. So a method
can be printed, compared, checkpointed, simulated, and asked for any round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from gossip_hvd.mixing import Array, combine, mean
from gossip_hvd.rounds import WEIGHTS, Round, Stage

Slots = Mapping[str, Array]
"""The cell's part of every payload slot and named array, by name."""


@dataclass(frozen=True)
class State:
    """What a method remembers from one round to the next; subclasses add their own numbers.

    Attributes:
        nodes: participants of the gossip.
        segments: segments of the model.
        seed: of every random choice.
    """

    nodes: int
    segments: int
    seed: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One cell whose messages have all come.

    Attributes:
        stage: the stage it belongs to.
        slot: the payload slot.
        unit: the segment or part.
        peers: the nodes it came from.
        weights: their weights, in the same order.
        sent: this node's own values as it sent them; the slot's own array where they are the
            same as now.
        received: the peers' values, in the same order.
        notes: the peers' notes (see ``Method.note``), by node.
        own_note: this node's note.
    """

    stage: Stage
    slot: str
    unit: int
    peers: tuple[int, ...]
    weights: tuple[float, ...]
    sent: Array
    received: Sequence[Array]
    notes: Mapping[int, Array]
    own_note: Array


@dataclass(frozen=True)
class Method:
    """One way to train: who meets whom, on which segment, with which weights, and when.

    Class attributes a method may set:
        name: as users write it.
        when: ``"step"``: rounds run after the local step; ``"reduction"``: after the node's
            gradients are averaged and before the local step.
        timings: which of ``"atc"`` and ``"awc"`` it allows.
        writes: payload slots that its rounds change.
        reads: payload slots that it reads without changing them.
        arrays: names of arrays of its own, as large as the model, kept by the engine (each
            rank holds its share only).
        needs_loss: True where ``note`` uses the loss that the user reports.
    """

    name: ClassVar[str] = ""
    when: ClassVar[Literal["step", "reduction"]] = "step"
    timings: ClassVar[tuple[str, ...]] = ("atc", "awc")
    writes: ClassVar[tuple[str, ...]] = (WEIGHTS,)
    reads: ClassVar[tuple[str, ...]] = ()
    arrays: ClassVar[tuple[str, ...]] = ()
    needs_loss: ClassVar[bool] = False

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """The state before round 0.

        Raises:
            ConfigError: where the options do not fit the number of nodes.
        """
        return State(nodes, segments, seed)

    def plan(self, state: State, number: int, me: int) -> Round:
        """What node ``me`` sends and receives in round ``number``.

        Depends on nothing but values that every node holds equal.
        """
        raise NotImplementedError

    def message(self, state: State, slot: str, unit: int, slots: Slots) -> Array | None:
        """What to send in place of the slot's values; None sends the values themselves."""
        return None

    def note(self, state: State, loss: float | None) -> Sequence[float]:
        """A few numbers that go to every peer of a round beside its values."""
        return ()

    def apply(self, state: State, arrival: Arrival, slots: Slots) -> None:
        """Mix one arrived cell; writes only to ``slots``."""
        RULES[arrival.stage.rule](arrival, slots[arrival.slot])

    def finish(
        self, state: State, done: Round, own_note: Array, notes: Mapping[int, Array]
    ) -> State:
        """The state after a round, from the notes that came with it."""
        return state

    def options(self) -> dict[str, Any]:
        """The method's options as plain values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def with_options(self, **changes: Any) -> Method:
        """The same method with other options."""
        return replace(self, **changes)


def _mix(arrival: Arrival, now: Array) -> None:
    """X ← W X, this node's row."""
    combine(now, arrival.sent, arrival.received, arrival.weights, out=now)


def _mean(arrival: Arrival, now: Array) -> None:
    """The exact mean of this node's values and all received, summed in double precision."""
    mean([now, *arrival.received], out=now)


def _copy(arrival: Arrival, now: Array) -> None:
    """The peer's values replace this node's."""
    now[...] = arrival.received[0]


RULES: dict[str, Callable[[Arrival, Array], None]] = {"mix": _mix, "mean": _mean, "copy": _copy}
