"""DecentLaM: momentum of the gossip gradient, which removes momentum's share of the disagreement.

    send  x_j − γ g_j
    g̃_i = (1/γ) [ x_i − Σ_j W_ij (x_j − γ g_j) ]  =  g_i − (1/γ) Σ_j w_ij (y_j − y_i),  y = x − γ g
    m_i ← β m_i + g̃_i ;   x_i ← x_i − γ m_i

The round runs after the node's reduction and turns the gradient into g̃; the optimizer, SGD with
momentum, does the rest. Σ g̃ = Σ g, so the mean over nodes follows plain momentum SGD.

| paper | here |
|---|---|
| g̃ | what the round makes of slot ``"gradients"`` |
| γ | the learning rate of each element + ``damping`` |
| m, β | the optimizer's own |

Cost: M bytes a peer, as gossip after the step; no memory.

Differs from the paper: ``damping`` ν puts γ + ν for γ in the first two lines, because g̃ contains
the disagreement divided by γ and a falling learning rate would let it grow (a fork of the
authors' method uses ν = 0.01); 0, the default, is the paper. Where γ + ν = 0 the gradient stays
as it is. Weight decay of the optimizer is added after mixing. The theory asks for a fixed,
positive definite W; graphs that change with the round work as a heuristic only.

Reference: Yuan, Chen, Huang, Zhang, Pan, Xu, Yin, "DecentLaM: Decentralized momentum SGD for
large-batch deep training", ICCV 2021 (arXiv 2104.11981).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods.contract import RATE, Arrival, Moment, Slots, State
from gossip_hvd.methods.gossip import OverGraph, mixing_round
from gossip_hvd.methods.registry import registered
from gossip_hvd.mixing import Array, combine
from gossip_hvd.rounds import GRADIENTS, WEIGHTS, Round
from gossip_hvd.topology import Topology


@registered
@dataclass(frozen=True)
class DecentLaM(OverGraph):
    """Gossip that reaches the weights through the momentum.

    Attributes:
        damping: ν, added to the learning rate inside g̃.
    """

    name: ClassVar[str] = "decentlam"

    topology: str | Topology = "ring"
    damping: float = 0.0

    @property
    def timings(self) -> tuple[str, ...]:
        """The step needs the result."""
        return ("atc",)

    @property
    def writes(self) -> tuple[str, ...]:
        """The gradient becomes the gossip gradient."""
        return (GRADIENTS,)

    @property
    def reads(self) -> tuple[str, ...]:
        """Weights are sent, as part of y."""
        return (WEIGHTS,)

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The rule is about SGD's momentum."""
        return ("SGD",)

    @property
    def needs_rate(self) -> bool:
        """γ."""
        return True

    def when(self, number: int) -> Moment:
        """Before the local step."""
        return "reduction"

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``."""
        if self.damping < 0:
            raise ConfigError(f"{self}: damping is 0 or more.")
        return super().start(nodes, segments, seed)

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        return mixing_round(self.topology_at(number), state, number, me, (GRADIENTS,))

    def message(
        self, state: State, number: int, slot: str, unit: int, slots: Slots
    ) -> Array | None:
        """The values of y = x − γ g."""
        if slot != GRADIENTS:
            return None
        y: Array = slots[WEIGHTS] - self._gamma(slots) * slots[GRADIENTS]
        return y

    def apply(self, state: State, arrival: Arrival, slots: Slots) -> None:
        """The equation's right side: g ← g − (1/γ) Σ_j w_ij (y_j − y_i)."""
        if arrival.slot != GRADIENTS or arrival.stage.rule != "mix":
            super().apply(state, arrival, slots)
            return
        g, gamma = slots[GRADIENTS], self._gamma(slots)
        pull = np.zeros_like(g)
        combine(pull, arrival.sent, arrival.received, arrival.weights, out=pull)
        np.divide(pull, gamma, out=pull, where=gamma > 0, casting="same_kind")
        np.subtract(g, pull, out=g, where=gamma > 0)

    def _gamma(self, slots: Slots) -> Array:
        rate = slots[RATE]
        gamma: Array = rate + rate.dtype.type(self.damping) if self.damping else rate
        return gamma
