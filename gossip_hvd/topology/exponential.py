"""One or a few peers a round at distances that grow by powers: exact after few rounds.

    x_i <- 1/(k+1) (x_i + sum_{j=1..k} x_{i - j (k+1)^(t mod tau)}),   tau = ceil(log_{k+1} n)

Over tau rounds the matrices multiply to (1/(k+1)^tau) sum_m P^m over m < (k+1)^tau (P the shift
by one), which is exactly 11^T/n where n divides (k+1)^tau: for k = 1, the powers of two. The
matrices commute, so the exactness holds from any starting round.

Cost a round: k messages each way, k times the model's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossip_hvd.errors import ConfigError
from gossip_hvd.topology.contract import (
    ALONE,
    Meeting,
    Periodic,
    circulant,
    digits_needed,
    log2_ceiling,
    mutual,
    one_way,
)


@dataclass(frozen=True)
class OnePeerExponential(Periodic):
    """Receive from distance 2^(t mod tau), tau = ceil(log2 n), with weight 1/2.

    Reference: Ying et al., NeurIPS 2021, arXiv:2110.13363, eq. (9) and Lemma 1.

    Attributes:
        stagger: segment s uses the distance of round t + s. Not in the paper.
    """

    stagger: bool = False

    def _at(self, me: int, n: int, place: int) -> Meeting:
        return one_way((me - 2**place) % n, (me + 2**place) % n)

    def _period(self, n: int) -> int:
        return log2_ceiling(n)

    def _exact_after(self, n: int) -> int | None:
        return self._period(n) if n & (n - 1) == 0 else None


@dataclass(frozen=True)
class KPeerExponential(Periodic):
    """k peers a round at the distances j (k+1)^(t mod tau), j = 1..k, 1/(k+1) each.

    Distances that agree modulo n are one peer with the sum of their weights, and distance 0 adds
    to the node's own, so any k goes with any n.

    Reference: Niwa et al., NeurIPS 2025 (openreview 8UMlKkCrNj), k-peer exponential graph; SGP's
    code, n-peer dynamic directed exponential graph. Differs from the former: tau is rounded up
    (their gap uses floor(log_{k+1} n)), as in the latter.
    """

    k: int = 2
    stagger: bool = False

    def __post_init__(self) -> None:
        """Refuse k < 1."""
        require_peers(self, self.k)

    def _at(self, me: int, n: int, place: int) -> Meeting:
        step, weight = (self.k + 1) ** place, 1.0 / (self.k + 1)
        return circulant(me, n, ((j * step, weight) for j in range(1, self.k + 1)))

    def _period(self, n: int) -> int:
        return digits_needed(n, self.k + 1)

    def _exact_after(self, n: int) -> int | None:
        tau = self._period(n)
        return tau if (self.k + 1) ** tau % n == 0 else None


@dataclass(frozen=True)
class DirectedExponential(KPeerExponential):
    """SGP's graph: send to the distances j (k+1)^(t mod tau), declared column-stochastic.

    The same matrix as `KPeerExponential`, meant for push-sum, whose scalar weight then stays 1.

    Reference: Assran et al., "Stochastic gradient push", ICML 2019, arXiv:1811.10792, App. A.
    """

    k: int = 1
    stochastic = "column"


@dataclass(frozen=True)
class Hypercube(Periodic):
    """Exchange with node me XOR 2^(t mod tau), weight 1/2: exact after log2 n rounds.

    Attributes:
        skip: for n that are no power of two, a node whose peer does not exist rests; without
            it such n are refused.
        stagger: segment s uses the dimension of round t + s.
    """

    skip: bool = False
    stagger: bool = False

    def _refusal(self, n: int) -> str | None:
        if n & (n - 1) == 0 or self.skip:
            return None
        return (
            f"{n} nodes are no power of two; use Hypercube(skip=True), in which nodes without a"
            " peer rest, or a topology for any number of nodes"
        )

    def _at(self, me: int, n: int, place: int) -> Meeting:
        peer = me ^ 2**place
        return mutual(((peer, 0.5),)) if peer < n else ALONE

    def _period(self, n: int) -> int:
        return log2_ceiling(n)

    def _exact_after(self, n: int) -> int | None:
        return self._period(n) if n & (n - 1) == 0 else None


def require_peers(topology: object, k: int) -> None:
    """Raise ConfigError unless k is a possible number of peers a round."""
    if k < 1:
        raise ConfigError(f"{topology}: k peers a round must be 1 or more")
