"""All-reduce SGD, the baseline: every rank steps with the mean gradient of all.

    g_i ← (1/n) Σ_j g_j ;  x_i ← x_i − γ d(g_i)

| paper | here |
|---|---|
| g_i | the node's mean gradient, slot ``"gradients"`` |

Cost: 2M(n−1)/n bytes a node and a round, on the critical path.

Differs from Horovod: summed in double precision, in two stages (to the part's owner, and from it)
instead of a ring's 2(n−1).

Reference: Sergeev, Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow",
2018 (arXiv 1802.05799).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossip_hvd.methods.contract import Method, Moment, State
from gossip_hvd.methods.registry import registered
from gossip_hvd.rounds import GRADIENTS, Round, exact_mean


@registered
@dataclass(frozen=True)
class AllReduce(Method):
    """The exact mean of the nodes' gradients before every step.

    In scope ``world`` an adapter may hand the reduction to Horovod, which then does it at once
    over all ranks; the result is the same within rounding.
    """

    name: ClassVar[str] = "allreduce"

    @property
    def timings(self) -> tuple[str, ...]:
        """The step needs the result: nothing can be merged later."""
        return ("atc",)

    @property
    def writes(self) -> tuple[str, ...]:
        """Gradients, not weights."""
        return (GRADIENTS,)

    def when(self, number: int) -> Moment:
        """Before the local step."""
        return "reduction"

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        return exact_mean(number, me, state.nodes, GRADIENTS)
