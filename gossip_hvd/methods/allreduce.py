"""All-reduce SGD, the baseline: every rank steps with the mean gradient of all.

    g_i ← (1/n) Σ_j g_j ;  x_i ← x_i − γ d(g_i)

Cost: 2M(n−1)/n bytes a node and a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gossip_hvd.methods.contract import Method, State
from gossip_hvd.rounds import GRADIENTS, Round, exact_mean


@dataclass(frozen=True)
class AllReduce(Method):
    """The exact mean of the nodes' gradients before every step.

    In scope ``world`` an adapter may hand the reduction to Horovod, which then does it at once
    over all ranks; the result is the same within rounding.
    """

    name: ClassVar[str] = "allreduce"
    when: ClassVar[Literal["step", "reduction"]] = "reduction"
    timings: ClassVar[tuple[str, ...]] = ("atc",)
    writes: ClassVar[tuple[str, ...]] = (GRADIENTS,)

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        return exact_mean(number, me, state.nodes, GRADIENTS)
