"""GossipGraD's partners: dissemination by powers of two, and rotation over shuffled orders.

    receive from (r + 2^i) mod n, send to (r - 2^i) mod n,   i = 0 .. ceil(log2 n) - 1, cyclic

`Rotated` lets any periodic topology run its sweeps over shuffled orders of the nodes, a new one
each sweep, n of them in turn: news then reaches a node directly from every other in time.

Cost a round: one message each way, the model's bytes (twice that with GossipGraD's momentum).

Differs from the authors' code: any n, not only powers of two (the sweep has ceil(log2 n) rounds,
exact only for powers of two); the orders are drawn by every node alike instead of broadcast.

Reference: Daily, Vishnu, Siegel, Warfel, Amatya, "GossipGraD", arXiv:1803.05880; matex-org's
caffe, `next_diffuse`, `next_cube` and their rotations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from gossip_hvd import draws
from gossip_hvd.topology.contract import (
    Edges,
    Meeting,
    Periodic,
    Segments,
    Topology,
    log2_ceiling,
    one_way,
)


@dataclass(frozen=True)
class Dissemination(Periodic):
    """Receive from me + 2^i, send to me - 2^i, weight 1/2: one-peer exponential, mirrored."""

    stagger: bool = False

    def _at(self, me: int, n: int, place: int) -> Meeting:
        return one_way((me + 2**place) % n, (me - 2**place) % n)

    def _period(self, n: int) -> int:
        return log2_ceiling(n)

    def _exact_after(self, n: int) -> int | None:
        return self._period(n) if n & (n - 1) == 0 else None


@dataclass(frozen=True)
class Rotated(Topology):
    """Sweeps of another topology over shuffled orders of the nodes, n orders in turn.

    Sweep k (one period of `inner`) uses the order k modulo n. All segments share the order.

    Attributes:
        inner: the topology of one sweep: `Dissemination` or `Hypercube` in the paper.
    """

    inner: Periodic = field(default_factory=Dissemination)

    def _refusal(self, n: int) -> str | None:
        return self.inner._refusal(n)

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        sweep = round // self.inner._period(n) % n
        order, places = _order(n, seed, sweep)
        met = self.inner._plan(places[me], n, seed, round, segments)
        return [Meeting(_renamed(one.receives, order), _renamed(one.sends, order)) for one in met]

    def _period(self, n: int) -> int:
        return self.inner._period(n) * n

    def _exact_after(self, n: int) -> int | None:
        return self.inner._exact_after(n)


def _renamed(edges: Edges, order: list[int]) -> Edges:
    return tuple((order[place], weight) for place, weight in edges)


@lru_cache(maxsize=16)
def _order(n: int, seed: int, sweep: int) -> tuple[list[int], list[int]]:
    """The sweep's order of the nodes, and each node's place in it."""
    order = draws.permutations(n, seed, sweep, (0,))[0]
    return order.tolist(), order.argsort().tolist()
