"""DSGD-AC: as the learning rate falls, nodes mix less, and keep a useful disagreement.

    x_i ← (1 − γ_t) x_i + γ_t Σ_j W_ij x_j ,     γ_t = (lr_t / lr_max)^p  from round ``begin`` on

| paper and code | here |
|---|---|
| adaptive gamma, γ_t | ``AdaptiveConsensusState.factor`` |
| p, start_epoch, min_gamma | ``power``, ``first``, ``floor`` |
| W | that of ``base`` |

Cost: that of the base. Take the exact average at the end, and evaluate that.

Differs from the authors' code: any base and timing (theirs: ring or one-peer exponential, AWC);
the start is counted in rounds. lr_t must be the same on every node in the same round, or the mean
is not kept: let schedules follow rounds, not the steps that a loss scaler lets through.

Reference: Wang, Johansson, "Decentralized SGD with controlled disagreement finds flatter minima",
2026 (arXiv 2602.02899).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods.contract import Context, State
from gossip_hvd.methods.over import Over, OverState
from gossip_hvd.methods.registry import registered
from gossip_hvd.rounds import Round, damped


@dataclass(frozen=True)
class AdaptiveConsensusState(OverState):
    """The agreed numbers of DSGD-AC.

    Attributes:
        largest: lr_max, the largest learning rate so far.
        factor: γ_t.
    """

    largest: float = 0.0
    factor: float = 1.0


@registered
@dataclass(frozen=True)
class AdaptiveConsensus(Over):
    """The base's mixing, weaker by γ_t.

    Attributes:
        power: p; 0 mixes as the base does.
        first: the first round in which γ_t counts.
        floor: γ_t is never smaller.
    """

    name: ClassVar[str] = "dsgd_ac"

    power: float = 3.0
    first: int = 0
    floor: float = 0.0

    @property
    def needs_rate(self) -> bool:
        """The ratio lr_t / lr_max."""
        return True

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``; the base must mix with its transfers' weights."""
        if self.inner.arrays:
            raise ConfigError(
                f"method {self.name!r} scales the weights of a mixing matrix, and "
                f"{self.inner.name!r} does more than mix: use gossip, crossover or sgp as base."
            )
        base = self.inner.start(nodes, segments, seed)
        return AdaptiveConsensusState(nodes, segments, seed, base)

    def observe(self, state: State, number: int, context: Context) -> State:
        """The new γ_t."""
        after = super().observe(state, number, context)
        assert isinstance(after, AdaptiveConsensusState)
        rate = context.rate or 0.0
        largest = max(after.largest, rate)
        factor = 1.0
        if number >= self.first and largest:
            factor = max(self.floor, (rate / largest) ** self.power)
        return replace(after, largest=largest, factor=factor)

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        assert isinstance(state, AdaptiveConsensusState)
        return damped(super().plan(state, number, me), state.factor)
