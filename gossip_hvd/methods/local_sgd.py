"""Local SGD and post-local SGD: every node trains alone, and at intervals all average exactly.

    y_i = x_i − γ d_i ;   x_i ← (1/n) Σ_j y_j  in every H(k)-th round, else x_i ← y_i

    local:        H(k) = H
    post-local:   H(k) = 1 before round t′ (large-batch SGD), H from then on

| paper | here |
|---|---|
| K or n workers | nodes; inside a node gradients are averaged in every step |
| H | ``period`` |
| t′, usually the first decay of the learning rate | ``switch`` |

Cost: 2M(n−1)/n bytes in one of H rounds, nothing in the others.

Differs from the papers: an H of 1 averages weights after the local step, not gradients before it;
with SGD, momentum included, the mean over nodes is the same. Momentum stays local and is kept
across averages; ``averaged_momentum`` over this method averages it too.

References: Stich, "Local SGD converges fast and communicates little", ICLR 2019; Lin, Stich,
Patel, Jaggi, "Don't use large mini-batches, use local SGD", ICLR 2020 (arXiv 1808.07217).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossip_hvd.methods.contract import Method, State
from gossip_hvd.methods.global_averaging import GossipPGA
from gossip_hvd.methods.registry import registered


@registered
@dataclass(frozen=True)
class LocalSGD(GossipPGA):
    """An exact average in every ``period``-th round, and nothing between."""

    name: ClassVar[str] = "local_sgd"

    base: str | Method = "none"
    period: float = 16


@registered
@dataclass(frozen=True)
class PostLocalSGD(LocalSGD):
    """An average in every round before ``switch``, then local SGD.

    Attributes:
        switch: t′, the first round of local SGD.
    """

    name: ClassVar[str] = "post_local_sgd"

    switch: int = 1000

    def due(self, state: State, number: int) -> bool:
        """H(k) = 1 before t′; from then on periods are counted from t′."""
        return number < self.switch or (number - self.switch + 1) % self.period == 0
