"""SlowMo: a slow momentum on top of periodic exact averages, over local SGD, gossip or SGP.

    every H rounds:   x̄ = (1/n) Σ_j y_j
                      u ← β u + (1/γ) (x₀ − x̄)
                      x₀ ← x₀ − α γ u ;   x_i ← x₀

| paper | here |
|---|---|
| base optimizer | the user's, over ``base``: ``"none"`` (local SGD), ``"gossip"``, ``"sgp"``, … |
| τ | ``period`` |
| α, β | ``alpha``, ``beta`` |
| γ_t | the learning rate of each element in that round |
| x_{t,0}, u | arrays ``"slow"``, ``"velocity"`` |

Cost: that of Gossip-PGA. The exact average hands each part of the model to one node for summing;
that node makes the slow step of the part before it sends the result to all. So x₀ and u are
needed once in the whole job (arrays are kept for a rank's share, of which 1/n is used).

Differs from the paper: β = 0, α = 1 gives Gossip-PGA bit by bit, as x₀ − αγu is computed as
x̄ + (1 − α)(x₀ − x̄) − αγβu. Momentum buffers of the base are kept; ``averaged_momentum`` over
this method averages them. With one node nothing is exchanged and no slow step is made.

Reference: Wang, Tantia, Ballas, Rabbat, "SlowMo: Improving communication-efficient distributed
SGD with slow momentum", ICLR 2020 (arXiv 1910.00643).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from gossip_hvd.methods.contract import RATE, Arrival, Method, Slots, State
from gossip_hvd.methods.global_averaging import GossipPGA
from gossip_hvd.methods.registry import registered
from gossip_hvd.mixing import accumulator
from gossip_hvd.rounds import WEIGHTS, Round

SLOW, VELOCITY = "slow", "velocity"

SLOW_MEAN = "slow mean"
"""The rule of an exact average that is followed by the slow step."""


@registered
@dataclass(frozen=True)
class SlowMo(GossipPGA):
    """Periodic exact averages with a momentum of their own.

    Attributes:
        beta: of the slow momentum.
        alpha: slow learning rate.
    """

    name: ClassVar[str] = "slowmo"

    base: str | Method = "none"
    period: float = 48
    beta: float = 0.5
    alpha: float = 1.0

    @property
    def arrays(self) -> tuple[str, ...]:
        """The slow weights and their momentum."""
        return (*self.inner.arrays, SLOW, VELOCITY)

    @property
    def hooks(self) -> tuple[str, ...]:
        """The slow weights begin as the weights."""
        return tuple(dict.fromkeys((*self.inner.hooks, "begin")))

    @property
    def needs_rate(self) -> bool:
        """γ."""
        return True

    def begin(self, state: State, number: int, slots: Slots) -> None:
        """Before the first round: x₀ is the common start."""
        super().begin(state, number, slots)
        slots[SLOW][...] = slots[WEIGHTS]

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        plan = super().plan(state, number, me)
        if not self.due(state, number) or not plan.stages:
            return plan
        first, *rest = plan.stages
        return replace(plan, stages=(replace(first, rule=SLOW_MEAN), *rest))

    def apply(self, state: State, arrival: Arrival, slots: Slots) -> None:
        """The mean as the base makes it, then the slow step of this part."""
        if arrival.stage.rule != SLOW_MEAN:
            super().apply(state, arrival, slots)
            return
        super().apply(state, replace(arrival, stage=replace(arrival.stage, rule="mean")), slots)
        if arrival.slot == WEIGHTS:
            self._slow_step(slots)

    def _slow_step(self, slots: Slots) -> None:
        x, x0, u, gamma = slots[WEIGHTS], slots[SLOW], slots[VELOCITY], slots[RATE]
        kind = accumulator(x.dtype).type
        alpha, beta = kind(self.alpha), kind(self.beta)
        behind = np.subtract(x0, x, dtype=kind)
        before = beta * u
        x[...] = x + (1 - alpha) * behind - alpha * gamma * before
        np.divide(behind, gamma, out=behind, where=gamma > 0)
        u[...] = before + behind
        x0[...] = x
