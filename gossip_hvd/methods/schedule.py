"""A schedule over methods: one from round 0, another from round t₁, and so on.

    phases = {0: "allreduce", 5000: "crossover", 80000: GossipPGA("crossover", period=6)}

Such schedules are SGP's and post-local SGD's remedies for early disagreement: all-reduce or more
peers in the first epochs, when learning rate and gradients are large, one peer later.

| here | meaning |
|---|---|
| ``phases`` | by its first round, each method or its name |
| ``ScheduleState.phases`` | the state of each |

Cost: that of the phase. Payload slots of all phases are kept at hand in all of them.

Each phase counts its rounds from 0, so that finite-time exact graphs begin at their beginning, and
starts from its fresh state. A phase of ``sgp`` should end with an exact average (``gossip_pga``
over it with a period that ends there): the next phase does not know its masses.

References: hybrid AR/SGP in Assran et al., ICML 2019; Lin et al., ICLR 2020 (post-local SGD).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods.contract import Arrival, Context, Method, Moment, Slots, State
from gossip_hvd.methods.registry import method_of, registered
from gossip_hvd.mixing import Array
from gossip_hvd.rounds import Round


@dataclass(frozen=True)
class ScheduleState(State):
    """The state of every phase, in order."""

    phases: tuple[State, ...] = ()


def _default() -> dict[int, str | Method]:
    return {0: "allreduce", 1000: "crossover"}


@registered
@dataclass(frozen=True)
class Schedule(Method):
    """Methods in turn.

    Attributes:
        phases: each method or its name, by its first round; one of them 0.
    """

    name: ClassVar[str] = "schedule"

    phases: Mapping[int, str | Method] = field(default_factory=_default)

    @cached_property
    def methods(self) -> dict[int, Method]:
        """The methods by their first rounds, in order."""
        return {start: method_of(self.phases[start]) for start in sorted(self.phases)}

    def phase(self, number: int) -> tuple[int, int, Method]:
        """Place, first round and method of the phase of round ``number``."""
        place = sum(start <= number for start in self.methods) - 1
        first = list(self.methods)[place]
        return place, first, self.methods[first]

    @property
    def timings(self) -> tuple[str, ...]:
        """Those that every phase allows; rounds before the local step never overlap anyway."""
        after = [m.timings for start, m in self.methods.items() if m.when(0) == "step"]
        return tuple(t for t in ("atc", "awc") if all(t in allowed for allowed in after))

    @property
    def writes(self) -> tuple[str, ...]:
        """See ``Method.writes``."""
        return self._all(lambda m: m.writes)

    @property
    def reads(self) -> tuple[str, ...]:
        """See ``Method.reads``."""
        return self._all(lambda m: m.reads)

    @property
    def arrays(self) -> tuple[str, ...]:
        """See ``Method.arrays``."""
        return self._all(lambda m: m.arrays)

    @property
    def replicas(self) -> tuple[str, ...]:
        """See ``Method.replicas``."""
        return self._all(lambda m: m.replicas)

    @property
    def hooks(self) -> tuple[str, ...]:
        """See ``Method.hooks``."""
        return self._all(lambda m: m.hooks)

    @property
    def needs_loss(self) -> bool:
        """See ``Method.needs_loss``."""
        return any(m.needs_loss for m in self.methods.values())

    @property
    def needs_rate(self) -> bool:
        """See ``Method.needs_rate``."""
        return any(m.needs_rate for m in self.methods.values())

    @property
    def linear(self) -> bool:
        """See ``Method.linear``."""
        return all(m.linear for m in self.methods.values())

    def when(self, number: int) -> Moment:
        """See ``Method.when``."""
        _, first, method = self.phase(number)
        return method.when(number - first)

    def begins(self, number: int) -> bool:
        """Every phase begins."""
        return number in self.methods

    def fitted(self, optimizer: str) -> Method:
        """See ``Method.fitted``."""
        return replace(self, phases={k: m.fitted(optimizer) for k, m in self.methods.items()})

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``."""
        if 0 not in self.phases:
            raise ConfigError(f"phases {sorted(self.phases)}: say which method from round 0 on.")
        states = tuple(m.start(nodes, segments, seed) for m in self.methods.values())
        return ScheduleState(nodes, segments, seed, states)

    def begin(self, state: State, number: int, slots: Slots) -> None:
        """See ``Method.begin``."""
        method, own, local = self._at(state, number)
        method.begin(own, local, slots)

    def before_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """See ``Method.before_step``."""
        method, own, local = self._at(state, number)
        method.before_step(own, local, parts)

    def after_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """See ``Method.after_step``."""
        method, own, local = self._at(state, number)
        method.after_step(own, local, parts)

    def end_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """See ``Method.end_step``."""
        method, own, local = self._at(state, number)
        method.end_step(own, local, parts)

    def observe(self, state: State, number: int, context: Context) -> State:
        """See ``Method.observe``."""
        method, own, local = self._at(state, number)
        return self._with(state, number, method.observe(own, local, context))

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        method, own, local = self._at(state, number)
        return replace(method.plan(own, local, me), number=number)

    def note(self, state: State, number: int, context: Context) -> Sequence[float]:
        """See ``Method.note``."""
        method, own, local = self._at(state, number)
        return method.note(own, local, context)

    def message(
        self, state: State, number: int, slot: str, unit: int, slots: Slots
    ) -> Array | None:
        """See ``Method.message``."""
        method, own, local = self._at(state, number)
        return method.message(own, local, slot, unit, slots)

    def apply(self, state: State, arrival: Arrival, slots: Slots) -> None:
        """See ``Method.apply``."""
        method, own, local = self._at(state, arrival.number)
        method.apply(own, replace(arrival, number=local), slots)

    def finish(
        self, state: State, done: Round, own_note: Array, notes: Mapping[int, Array]
    ) -> State:
        """See ``Method.finish``."""
        method, own, local = self._at(state, done.number)
        after = method.finish(own, replace(done, number=local), own_note, notes)
        return self._with(state, done.number, after)

    def levelled(self, state: State) -> State:
        """See ``Method.levelled``."""
        assert isinstance(state, ScheduleState)
        pairs = zip(self.methods.values(), state.phases, strict=True)
        return replace(state, phases=tuple(m.levelled(own) for m, own in pairs))

    def mass(self, state: State, number: int) -> float:
        """See ``Method.mass``."""
        method, own, local = self._at(state, number)
        return method.mass(own, local)

    def _at(self, state: State, number: int) -> tuple[Method, State, int]:
        """The method of a round, its state, and the round's number in its phase."""
        assert isinstance(state, ScheduleState)
        place, first, method = self.phase(number)
        return method, state.phases[place], number - first

    def _with(self, state: State, number: int, own: State) -> State:
        assert isinstance(state, ScheduleState)
        place, _, _ = self.phase(number)
        phases = (*state.phases[:place], own, *state.phases[place + 1 :])
        return replace(state, phases=phases)

    def _all(self, need: Callable[[Method], Iterable[str]]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item for m in self.methods.values() for item in need(m)))
