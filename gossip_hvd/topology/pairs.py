"""Mutual exchanges in pairs: alternating ring, random matching, bipartite exponential graph.

In every round each node exchanges with at most one other, x_i, x_j <- 1/2 (x_i + x_j), so W is
symmetric. A node without a partner rests.

Cost a round: one message each way, the model's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gossip_hvd import draws
from gossip_hvd.topology.contract import (
    ALONE,
    Meeting,
    Periodic,
    Segments,
    Topology,
    log2_ceiling,
    mutual,
)


@dataclass(frozen=True)
class OnePeerRing(Periodic):
    """The left neighbour in one round, the right one in the next.

    For even n the rounds alternate. For odd n the pairs move on by one node a round and the node
    between the last pair and the first rests; each rests once in n rounds.
    """

    def _at(self, me: int, n: int, place: int) -> Meeting:
        partner = (me - place) % n ^ 1
        return mutual((((partner + place) % n, 0.5),)) if partner < n else ALONE

    def _period(self, n: int) -> int:
        return 1 if n == 2 else 2 if n % 2 == 0 else n

    def _exact_after(self, n: int) -> int | None:
        return {2: 1, 4: 2}.get(n)


@dataclass(frozen=True)
class RandomMatching(Topology):
    """Uniformly random pairs, drawn anew for every round and segment; odd n leaves one idle."""

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        order = shuffled_orders(n, seed, round, segments)
        partners = (order == me).argmax(axis=1) ^ 1
        return [
            mutual(((int(order[row, place]), 0.5),)) if place < n else ALONE
            for row, place in enumerate(partners.tolist())
        ]

    def _exact_after(self, n: int) -> int | None:
        return 1 if n == 2 else None


@dataclass(frozen=True)
class BipartiteExponential(Periodic):
    """Even nodes meet odd nodes at the distances +-1, +-(1 + 2), +-(1 + 4), ... ; even n only.

    The even node e exchanges with e + d, the odd node o with o - d; d takes each value once a
    period, repetitions modulo n left out.

    Reference: SGP's code, dynamic bipartite exponential graph, used there for D-PSGD and
    AD-PSGD. Differs from it: there a node sends to +d and receives from -d and the parity only
    orders the calls; here the two of a pair exchange, as AD-PSGD's pairs do.
    """

    def _refusal(self, n: int) -> str | None:
        if n % 2 == 0:
            return None
        return f"{n} nodes are an odd number, and even nodes meet odd ones; use RandomMatching"

    def _at(self, me: int, n: int, place: int) -> Meeting:
        distance = _odd_distances(n)[place]
        return mutual((((me + (-distance if me % 2 else distance)) % n, 0.5),))

    def _period(self, n: int) -> int:
        return len(_odd_distances(n))

    def _exact_after(self, n: int) -> int | None:
        # Found by multiplying out; no other even n up to 64 is exact within three periods.
        return {2: 1, 4: 2, 8: 3, 16: 5}.get(n)


@lru_cache(maxsize=64)
def _odd_distances(n: int) -> tuple[int, ...]:
    """1, -1, 3, -3, 5, -5, 9, -9, ... modulo n, each once."""
    reach = [1] + [1 + 2**i for i in range(1, log2_ceiling(n))]
    return tuple(dict.fromkeys(sign * d % n for d in reach for sign in (1, -1)))


@lru_cache(maxsize=16)
def shuffled_orders(n: int, seed: int, round: int, segments: Segments) -> draws.Integers:
    """A random order of the nodes for each segment: shape (segments, n)."""
    order = draws.permutations(n, seed, round, segments)
    order.flags.writeable = False
    return order
