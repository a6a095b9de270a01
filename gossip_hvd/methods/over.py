"""A method over another one: it changes one thing and leaves the rest to its base.

Periodic averages, slow momentum, quasi-global momentum and the like say nothing about who meets
whom; that is the base's business. ``Over`` passes every question on to the base, so a method of
this kind is as short as its paper's rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from gossip_hvd.methods.contract import Arrival, Context, Method, Moment, Slots, State
from gossip_hvd.methods.registry import method_of, registered
from gossip_hvd.mixing import Array
from gossip_hvd.rounds import Round


@registered
@dataclass(frozen=True)
class Silent(Method):
    """No exchange: every node trains alone; the base of local SGD."""

    name: ClassVar[str] = "none"

    def plan(self, state: State, number: int, me: int) -> Round:
        """An empty round."""
        return Round(number)


@dataclass(frozen=True)
class OverState(State):
    """The state of a method over another.

    Attributes:
        base: the other's state.
    """

    base: State


@dataclass(frozen=True)
class Over(Method):
    """Passes everything on to the base.

    Attributes:
        base: a method, or the name of one.
    """

    base: str | Method = "gossip"

    @cached_property
    def inner(self) -> Method:
        """The base as a method."""
        return method_of(self.base)

    @property
    def timings(self) -> tuple[str, ...]:
        """See ``Method.timings``."""
        return self.inner.timings

    @property
    def writes(self) -> tuple[str, ...]:
        """See ``Method.writes``."""
        return self.inner.writes

    @property
    def reads(self) -> tuple[str, ...]:
        """See ``Method.reads``."""
        return self.inner.reads

    @property
    def arrays(self) -> tuple[str, ...]:
        """See ``Method.arrays``."""
        return self.inner.arrays

    @property
    def replicas(self) -> tuple[str, ...]:
        """See ``Method.replicas``."""
        return self.inner.replicas

    @property
    def hooks(self) -> tuple[str, ...]:
        """See ``Method.hooks``."""
        return self.inner.hooks

    @property
    def optimizers(self) -> tuple[str, ...]:
        """See ``Method.optimizers``."""
        return self.inner.optimizers

    @property
    def needs_loss(self) -> bool:
        """See ``Method.needs_loss``."""
        return self.inner.needs_loss

    @property
    def needs_rate(self) -> bool:
        """See ``Method.needs_rate``."""
        return self.inner.needs_rate

    @property
    def linear(self) -> bool:
        """See ``Method.linear``."""
        return self.inner.linear

    def when(self, number: int) -> Moment:
        """See ``Method.when``."""
        return self.inner.when(number)

    def begins(self, number: int) -> bool:
        """See ``Method.begins``."""
        return self.inner.begins(number)

    def fitted(self, optimizer: str) -> Method:
        """See ``Method.fitted``."""
        super().fitted(optimizer)
        return replace(self, base=self.inner.fitted(optimizer))

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``."""
        return OverState(nodes, segments, seed, self.inner.start(nodes, segments, seed))

    def begin(self, state: State, number: int, slots: Slots) -> None:
        """See ``Method.begin``."""
        self.inner.begin(of_base(state), number, slots)

    def before_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """See ``Method.before_step``."""
        self.inner.before_step(of_base(state), number, parts)

    def after_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """See ``Method.after_step``."""
        self.inner.after_step(of_base(state), number, parts)

    def end_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """See ``Method.end_step``."""
        self.inner.end_step(of_base(state), number, parts)

    def observe(self, state: State, number: int, context: Context) -> State:
        """See ``Method.observe``."""
        return with_base(state, self.inner.observe(of_base(state), number, context))

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        return self.inner.plan(of_base(state), number, me)

    def note(self, state: State, number: int, context: Context) -> Sequence[float]:
        """See ``Method.note``; a method over this one may add numbers behind the base's."""
        return self.inner.note(of_base(state), number, context)

    def message(
        self, state: State, number: int, slot: str, unit: int, slots: Slots
    ) -> Array | None:
        """See ``Method.message``."""
        return self.inner.message(of_base(state), number, slot, unit, slots)

    def apply(self, state: State, arrival: Arrival, slots: Slots) -> None:
        """See ``Method.apply``."""
        self.inner.apply(of_base(state), arrival, slots)

    def finish(
        self, state: State, done: Round, own_note: Array, notes: Mapping[int, Array]
    ) -> State:
        """See ``Method.finish``."""
        return with_base(state, self.inner.finish(of_base(state), done, own_note, notes))

    def levelled(self, state: State) -> State:
        """See ``Method.levelled``."""
        return with_base(state, self.inner.levelled(of_base(state)))

    def mass(self, state: State, number: int) -> float:
        """See ``Method.mass``."""
        return self.inner.mass(of_base(state), number)


def of_base(state: State) -> State:
    """The base's part of a state."""
    assert isinstance(state, OverState)
    return state.base


def with_base(state: State, base: State) -> State:
    """The same state with another base's part."""
    assert isinstance(state, OverState)
    return state if base is state.base else replace(state, base=base)
