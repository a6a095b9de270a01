"""EquiTopo's one-peer graphs: one shared random distance, a contraction independent of n.

    OD-EquiDyn:  W = (1 - eta) I + eta [ (1/n) I + ((n-1)/n) P^d ],   d uniform in 1 .. n-1
    OU-EquiDyn:  the same with a matching that pairs i with i + d in place of P^d

| paper | here |
|---|---|
| eta | `eta` |
| u or p, the shared distance | `d` |
| s, the random starting node | `start` |

Cost a round: one message each way, the model's bytes.

Differs from the authors' code: the matching is not built by their greedy scan of all nodes but
by its closed form (`_partner`), O(1) a node.

Reference: Song, Li, Jin, Shi, Yan, Yin, Yuan, "Communication-efficient topologies for
decentralized learning with O(1) consensus rate", NeurIPS 2022, arXiv:2210.07881, Algorithms 3
and 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossip_hvd import draws
from gossip_hvd.errors import ConfigError
from gossip_hvd.topology.contract import ALONE, Meeting, Segments, Topology, mutual, one_way


@dataclass(frozen=True)
class ODEquiDyn(Topology):
    """Directed: receive from me - d with weight eta (n-1) / n.

    Attributes:
        eta: in (0, 1]; the authors' runs use 0.53.
    """

    eta: float = 0.53

    def __post_init__(self) -> None:
        """Refuse an eta outside (0, 1]."""
        _require_eta(self, self.eta)

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        weight = self.eta * (n - 1) / n
        distances = draws.uniform_integers(n - 1, seed, round, segments)[:, 0] + 1
        return [one_way((me - d) % n, (me + d) % n, weight) for d in distances.tolist()]


@dataclass(frozen=True)
class OUEquiDyn(Topology):
    """Undirected: pairs at distance d, found greedily from a random start; some nodes rest.

    Attributes:
        eta: in (0, 1]; the authors' runs use 0.53.
    """

    eta: float = 0.53

    def __post_init__(self) -> None:
        """Refuse an eta outside (0, 1]."""
        _require_eta(self, self.eta)

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        weight = self.eta * (n - 1) / n
        distances = draws.uniform_integers(n - 1, seed, round, segments)[:, 0] + 1
        starts = draws.uniform_integers(n, seed, round, segments, start=1)[:, 0]
        meetings = []
        for d, start in zip(distances.tolist(), starts.tolist(), strict=True):
            peer = _partner(me, n, d, start)
            meetings.append(ALONE if peer is None else mutual(((peer, weight),)))
        return meetings


def _partner(me: int, n: int, d: int, start: int) -> int | None:
    """Whom the greedy scan from `start` gives this node, or None.

    The scan visits start, start + 1, ... and pairs i with i + d if both are free. Counted from
    `start`, it pairs blocks of a fixed length with the block after: blocks of d while d <= n/2.
    For larger d the first q = n - d nodes pair with the last q; the others, visited later, reach
    backwards by q (d = -q modulo n), which pairs blocks of q among themselves.
    """
    place = (me - start) % n
    if 2 * d <= n:
        first, length, block = 0, n, d
    else:
        q = n - d
        if place < q or place >= d:
            return (me + d) % n if place < q else (me - d) % n
        first, length, block = q, d - q, q
    inside = place - first
    if inside // block % 2:
        return (me - block) % n
    return (me + block) % n if inside + block < length else None


def _require_eta(topology: object, eta: float) -> None:
    if not 0.0 < eta <= 1.0:
        raise ConfigError(f"{topology}: eta must be in (0, 1]")
