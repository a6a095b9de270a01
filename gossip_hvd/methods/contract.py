"""The contract every method keeps: plan a round, apply what arrived; no I/O, no clock, no counter.

A method is a frozen dataclass of its options. All that changes while it runs is in its ``State``,
a frozen dataclass of plain numbers, and in named arrays that the engine keeps for it. So a method
can be printed, compared, checkpointed, simulated, and asked for any round.

One training step, as a method sees it (rounds "after reduction" run between 1 and 2):

    1  gradients are averaged over the node     begin (before the method's first round)
    2  before_step                              whole slots, every rank of the node
    3  the optimizer's own step
    4  after_step                               whole slots
    5  observe, plan, note, message             the round is posted (AWC: after the last one landed)
    6  apply, once for each cell that arrived   the cell's owner
    7  finish                                   the new state
    8  end_step                                 whole slots
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from gossip_hvd.errors import ConfigError
from gossip_hvd.mixing import Array, combine, mean
from gossip_hvd.rounds import MOMENTUM, VARIANCE, WEIGHTS, Round, Stage

Slots = Mapping[str, Array]
"""One stretch of every payload slot and named array, by name; all of one length."""

Moment = Literal["step", "reduction"]

RATE = "rate"
"""Read-only among the ``Slots``: the learning rate of every element (see ``Method.needs_rate``)."""

HISTORIES = {
    "SGD": (MOMENTUM,),
    "Adam": (MOMENTUM, VARIANCE),
    "AdamW": (MOMENTUM, VARIANCE),
}
"""The payload slots of an optimizer's history, for the optimizers that methods know by name."""


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


S = TypeVar("S", bound=State)


def restored(start: S, plain: Mapping[str, Any]) -> S:
    """The state that ``dataclasses.asdict`` has turned into plain values, JSON's lists included.

    Args:
        start: a state of the same method, from ``Method.start``; it knows the classes.
        plain: the values.
    """

    def revive(old: Any, new: Any) -> Any:
        if is_dataclass(old):
            return restored(old, new)  # type: ignore[type-var]
        if isinstance(old, tuple) and any(is_dataclass(item) for item in old):
            return tuple(revive(a, b) for a, b in zip(old, new, strict=True))
        return tuple(new) if isinstance(new, list) else new

    return replace(
        start, **{f.name: revive(getattr(start, f.name), plain[f.name]) for f in fields(start)}
    )


@dataclass(frozen=True, slots=True)
class Context:
    """What an adapter reports before a round.

    Attributes:
        rate: the learning rate of the step, the largest where parameters differ; the same on
            every node. None where nobody said.
        loss: of this node, the same on all its ranks. None where nobody said.
    """

    rate: float | None = None
    loss: float | None = None


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
        number: the round's number.
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
    number: int = 0


@dataclass(frozen=True)
class Method:
    """One way to train: who meets whom, on which segment, with which weights, and when.

    The properties say what a method needs; the rest is what it does.

    Attributes:
        name: as users write it.
    """

    name: ClassVar[str] = ""

    @property
    def timings(self) -> tuple[str, ...]:
        """Which of ``"atc"`` and ``"awc"`` it allows."""
        return ("atc", "awc")

    @property
    def writes(self) -> tuple[str, ...]:
        """Payload slots that its rounds and hooks change."""
        return (WEIGHTS,)

    @property
    def reads(self) -> tuple[str, ...]:
        """Payload slots that it reads without changing them."""
        return ()

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of its own arrays for ``begin``, ``message`` and ``apply``; a rank's share each."""
        return ()

    @property
    def replicas(self) -> tuple[str, ...]:
        """Names of its own arrays for the hooks on whole slots; as large as the model each."""
        return ()

    @property
    def hooks(self) -> tuple[str, ...]:
        """Which of ``begin``, ``before_step``, ``after_step`` and ``end_step`` it has."""
        return ()

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers it knows by name, where it touches their history; empty for any."""
        return ()

    @property
    def needs_loss(self) -> bool:
        """Whether a loss must be reported before every round."""
        return False

    @property
    def needs_rate(self) -> bool:
        """Whether the learning rate must be reported before every round and step."""
        return False

    @property
    def linear(self) -> bool:
        """Whether a round is X ← W X and no more.

        Then it may be posted before the last one has been merged: what it plans and sends depends
        on nothing that a round brings.
        """
        return False

    def when(self, number: int) -> Moment:
        """When round ``number`` runs: after the local step, or before it, after the reduction."""
        return "step"

    def begins(self, number: int) -> bool:
        """Whether ``begin`` is due once more before round ``number``, as before the first."""
        return False

    def fitted(self, optimizer: str) -> Method:
        """This method as it works with the optimizer of that name.

        Raises:
            ConfigError: where it does not know the optimizer.
        """
        if self.optimizers and optimizer not in self.optimizers:
            raise ConfigError(
                f"method {self.name!r} works on the optimizer's history and knows "
                f"{', '.join(self.optimizers)}, not {optimizer}: use one of these, or a method "
                "that leaves momentum local."
            )
        return self

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """The state before round 0.

        Raises:
            ConfigError: where the options do not fit the number of nodes.
        """
        return State(nodes, segments, seed)

    def begin(self, state: State, number: int, slots: Slots) -> None:
        """Give ``arrays`` their first values, which are zeros otherwise; this rank's share."""

    def before_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """Before the local step that belongs to round ``number``; whole slots and replicas.

        Every rank of a node does the same to the same values, so replicas stay bit-equal.
        """

    def after_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """Directly after the local step."""

    def end_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """After the local step and all rounds that ran or landed with it."""

    def observe(self, state: State, number: int, context: Context) -> State:
        """The state with what it keeps of the reported numbers, before round ``number``."""
        return state

    def plan(self, state: State, number: int, me: int) -> Round:
        """What node ``me`` sends and receives in round ``number``.

        Depends on nothing but values that every node holds equal.
        """
        raise NotImplementedError

    def note(self, state: State, number: int, context: Context) -> Sequence[float]:
        """A few numbers that go to every peer of round ``number`` beside its values."""
        return ()

    def message(
        self, state: State, number: int, slot: str, unit: int, slots: Slots
    ) -> Array | None:
        """What to send in place of the slot's values; None sends the values themselves.

        Asked where the stage's rule is ``"mix"``; exact averages are of the values themselves.
        """
        return None

    def apply(self, state: State, arrival: Arrival, slots: Slots) -> None:
        """Mix one arrived cell; writes only to ``slots``.

        A cell that was sent as a copy (late, rounded, or a ``message``) and has no sender comes
        here with nothing received: what it gave away may matter.

        Rules ``"mean"`` and ``"copy"`` may come from any exact average, planned or asked for by
        the user, with any method.
        """
        RULES[arrival.stage.rule](arrival, slots[arrival.slot])

    def finish(
        self, state: State, done: Round, own_note: Array, notes: Mapping[int, Array]
    ) -> State:
        """The state after a round, from the notes that came with it."""
        return state

    def levelled(self, state: State) -> State:
        """The state once an exact average, or the user, has replaced the weights of every node."""
        return state

    def mass(self, state: State, number: int) -> float:
        """How much this node's weights count in the mean over nodes, before round ``number``."""
        return 1.0

    def options(self) -> dict[str, Any]:
        """The method's options as plain values; objects as their text."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def with_options(self, **changes: Any) -> Method:
        """The same method with other options."""
        return replace(self, **changes)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else repr(value)


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
