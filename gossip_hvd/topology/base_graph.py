"""Base-(k+1) graphs: the exact average of any n in O(log_{k+1} n) rounds, k peers at most.

Three constructions, each from the one before:

1. Hyper-hypercube, where all prime factors of n are <= k+1: write n = n_1 ... n_L with factors
   <= k+1, L least; in round l the nodes average in groups of n_l (mixed-radix digits).
2. Simple base graph, any n: write n = sum_l a_l (k+1)^{p_l} with p_1 > p_2 > ... and split the
   nodes into subsets V_l of a_l chunks of (k+1)^{p_l}.
   First each V_l averages inside (hyper-hypercube).
   Then for l = 1 .. L-1, every node of a later subset exchanges with one node of each chunk of
   V_l, with weight |V_l| / (a_l sum_{m >= l} |V_m|). The later node then has the mixture of V_l
   and itself in the right proportion, and the sum in each chunk is that of the global mean.
   Directly after its exchange each chunk of V_l averages inside.
   Length |H(V_1)| + 1 + p_1.
3. Base graph: n = p q with p the largest divisor whose prime factors are <= k+1; a simple base
   graph in each of p blocks of q nodes, then a hyper-hypercube across the blocks; or the simple
   base graph of all, whichever is shorter.

| paper | here |
|---|---|
| k, maximum degree | `k` |
| V_l, V_{l,a} | `subsets[l]`, its chunks |
| H_k(V) | `_hyper_hypercube` |

Cost a round: k messages each way at most, k times the model's bytes; some nodes rest.

The matrices do not commute: the average is exact after one period from its beginning.

Reference: Takezawa, Sato, Bao, Niwa, Yamada, "Beyond exponential graph", NeurIPS 2023,
arXiv:2305.11420, Algorithms 1 to 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import TypeAlias

from gossip_hvd.topology.contract import Edges, Meeting, Periodic, mutual
from gossip_hvd.topology.exponential import require_peers

Links: TypeAlias = dict[tuple[int, int], float]
"""One round: the undirected edges and their weights."""
Schedule: TypeAlias = tuple[tuple[Edges, ...], ...]
"""For each round each node's edges."""


@dataclass(frozen=True)
class BaseGraph(Periodic):
    """The Base-(k+1) graph.

    Attributes:
        k: the most peers a node has in one round.
    """

    k: int = 1

    def __post_init__(self) -> None:
        """Refuse k < 1."""
        require_peers(self, self.k)

    def _at(self, me: int, n: int, place: int) -> Meeting:
        return mutual(_schedule(n, self.k, False)[place][me])

    def _period(self, n: int) -> int:
        return len(_schedule(n, self.k, False))

    def _exact_after(self, n: int) -> int | None:
        return self._period(n)


@dataclass(frozen=True)
class SimpleBaseGraph(BaseGraph):
    """The simple Base-(k+1) graph: without the factorisation n = p q."""

    def _at(self, me: int, n: int, place: int) -> Meeting:
        return mutual(_schedule(n, self.k, True)[place][me])

    def _period(self, n: int) -> int:
        return len(_schedule(n, self.k, True))


@lru_cache(maxsize=32)
def _schedule(n: int, k: int, simple: bool) -> Schedule:
    rounds = _simple(range(n), k)
    if not simple:
        rounds = min(rounds, _blocked(n, k), key=len)
    table: list[tuple[Edges, ...]] = []
    for links in rounds:
        rows: list[list[tuple[int, float]]] = [[] for _ in range(n)]
        for (i, j), weight in links.items():
            rows[i].append((j, weight))
            rows[j].append((i, weight))
        table.append(tuple(tuple(row) for row in rows))
    return tuple(table)


def _blocked(n: int, k: int) -> list[Links]:
    """Simple base graphs in p blocks of q nodes, then a hyper-hypercube across the blocks."""
    p = max(d for d in range(1, n + 1) if n % d == 0 and _factors(d, k + 1) is not None)
    q = n // p
    rounds = _side_by_side(_simple(range(b * q, (b + 1) * q), k) for b in range(p))
    return rounds + _side_by_side(_hyper_hypercube(range(i, n, q), k) for i in range(q))


def _simple(nodes: Sequence[int], k: int) -> list[Links]:
    """The simple base graph of these nodes."""
    if _factors(len(nodes), k + 1) is not None:
        return _hyper_hypercube(nodes, k)
    subsets = _split(nodes, k + 1)
    inside = [_hyper_hypercube([v for chunk in chunks for v in chunk], k) for chunks in subsets]
    start = len(inside[0])
    rounds: list[Links] = [{} for _ in range(start + 1 + len(_hyper_hypercube(subsets[0][0], k)))]
    for part in inside:
        _put(rounds, 0, part)
    remaining = len(nodes)
    for place, chunks in enumerate(subsets[:-1]):
        later = [v for behind in subsets[place + 1 :] for chunk in behind for v in chunk]
        weight = len(chunks[0]) / remaining
        for chunk in chunks:
            exchange = dict.fromkeys(zip(chunk, later, strict=False), weight)
            # The others of the chunk would rest; equal by now, they lose nothing by averaging.
            _put(rounds, start + place, [exchange | _together(chunk[len(later) :], k + 1)])
            _put(rounds, start + place + 1, _hyper_hypercube(chunk, k))
        remaining -= sum(len(chunk) for chunk in chunks)
    return rounds


def _hyper_hypercube(nodes: Sequence[int], k: int) -> list[Links]:
    """Average in groups along each digit of the place in mixed radix."""
    rounds: list[Links] = []
    stride = 1
    for factor in _factors(len(nodes), k + 1) or ():
        links: Links = {}
        for place in range(len(nodes)):
            if place // stride % factor == 0:
                links |= _average([nodes[place + stride * digit] for digit in range(factor)])
        rounds.append(links)
        stride *= factor
    return rounds


def _split(nodes: Sequence[int], base: int) -> list[list[Sequence[int]]]:
    """The nodes as the digits of their number in this base: a_l chunks of base^{p_l}."""
    power = 1
    while power * base <= len(nodes):
        power *= base
    subsets: list[list[Sequence[int]]] = []
    taken = 0
    while power:
        digit = (len(nodes) - taken) // power
        if digit:
            ends = range(taken, taken + digit * power, power)
            subsets.append([nodes[end : end + power] for end in ends])
            taken += digit * power
        power //= base
    return subsets


def _together(nodes: Sequence[int], size: int) -> Links:
    """Average these nodes in groups of at most this size."""
    links: Links = {}
    for start in range(0, len(nodes), size):
        links |= _average(nodes[start : start + size])
    return links


def _average(group: Sequence[int]) -> Links:
    return {pair: 1.0 / len(group) for pair in combinations(group, 2)}


def _put(rounds: list[Links], start: int, part: list[Links]) -> None:
    for offset, links in enumerate(part):
        rounds[start + offset].update(links)


def _side_by_side(parts: Iterable[list[Links]]) -> list[Links]:
    """Schedules of disjoint nodes and equal length, run at the same time."""
    merged: list[Links] = []
    for part in parts:
        merged = merged or [{} for _ in part]
        _put(merged, 0, part)
    return merged


@lru_cache(maxsize=1024)
def _factors(n: int, largest: int) -> tuple[int, ...] | None:
    """The shortest list of factors in 2 .. largest with product n, or None if there is none."""
    if n == 1:
        return ()
    best: tuple[int, ...] | None = None
    for factor in range(min(n, largest), 1, -1):
        rest = _factors(n // factor, largest) if n % factor == 0 else None
        if rest is not None and (best is None or len(rest) + 1 < len(best)):
            best = (factor, *rest)
    return best
