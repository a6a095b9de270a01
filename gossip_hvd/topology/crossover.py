"""Crossover-SGD's peers: one random source a segment, drawn fairly, shifted, or freely.

Every node receives one segment from one node and sends it to one other,

    x_i[s] <- 1/2 x_i[s] + 1/2 x_src(i)[s],    W_s = (I + P_s) / 2,

with P_s drawn anew for every round and segment s. Where src is a derangement (`Fair`,
`Derangement`, `Shift`), W_s is doubly stochastic and the mean is kept; `Unfair` is the paper's
ablation "without fair peer selection", whose mean wanders.

| paper, authors' code | here |
|---|---|
| dest[i], the node that node i receives from | `sources[i]` |
| roulette | the order in which `sources` is drawn |

Cost a round: one message each way a segment, the model's bytes in all.

The disagreement of a uniform derangement, and of a random shift, shrinks in expectation to
(n-2) / (2 (n-1)) of itself a round: both meet every other node with equal chance.

Reference: Yeo, Bae, Jeong, Kwon, Oh, "Crossover-SGD", arXiv:2012.15198, Algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gossip_hvd import draws
from gossip_hvd.topology.contract import Meeting, Segments, Topology, one_way


@dataclass(frozen=True)
class Fair(Topology):
    """Algorithm 2's roulette: node 0, 1, ... each draws among the sources nobody has taken.

    Node i draws uniformly from the sources not yet taken, itself excluded; node n-2 takes n-1 if
    it is still free (in the authors' code, not in the printed algorithm: without it the last
    node may find only itself). The result is a derangement, but not a uniform one: late nodes
    meet each other more often.

    Differs from the authors' code: not a loop of n draws. A uniform permutation is such a
    sequence of draws that knows no "itself excluded"; where node i has drawn itself it draws
    again, by swapping with a uniformly chosen later place. That is the same law (its probability
    for every derangement is compared with the roulette's in the tests) with one repair a segment
    instead of n steps.
    """

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        return _own(fair_sources(n, seed, round, segments), me)

    def _exact_after(self, n: int) -> int | None:
        return 1 if n == 2 else None


@dataclass(frozen=True)
class Derangement(Topology):
    """A uniform random derangement: all permutations without fixed point are equally likely."""

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        return _own(derangement_sources(n, seed, round, segments), me)

    def _exact_after(self, n: int) -> int | None:
        return 1 if n == 2 else None


@dataclass(frozen=True)
class Shift(Topology):
    """A random circular shift: all receive from the same distance d, uniform in 1 .. n-1.

    The expected contraction of `Derangement` from one integer a segment: O(1) at any n.
    """

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        distances = draws.uniform_integers(n - 1, seed, round, segments)[:, 0] + 1
        return [one_way((me - d) % n, (me + d) % n) for d in distances.tolist()]

    def _exact_after(self, n: int) -> int | None:
        return 1 if n == 2 else None


@dataclass(frozen=True)
class Unfair(Topology):
    """Every node draws its source freely among the others; some sources are drawn twice.

    Row-stochastic only: a node may have several receivers or none, and the mean is not kept.
    """

    stochastic = "row"

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        sources = free_choices(n, seed, round, segments)
        receivers = _takers(sources, me)
        return [
            Meeting(((source, 0.5),), tuple((peer, 0.5) for peer in peers))
            for source, peers in zip(sources[:, me].tolist(), receivers, strict=True)
        ]

    def _exact_after(self, n: int) -> int | None:
        return 1 if n == 2 else None


@dataclass(frozen=True)
class RandomPush(Topology):
    """Every node sends half of itself to a freely drawn node: `Unfair` with arrows reversed.

    Column-stochastic only, so it needs push-sum. Reference: Kempe, Dobra, Gehrke, "Gossip-based
    computation of aggregate information", FOCS 2003, Protocol Push-Sum.
    """

    stochastic = "column"

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        targets = free_choices(n, seed, round, segments)
        senders = _takers(targets, me)
        return [
            Meeting(tuple((peer, 0.5) for peer in peers), ((target, 0.5),))
            for target, peers in zip(targets[:, me].tolist(), senders, strict=True)
        ]

    def _exact_after(self, n: int) -> int | None:
        return 1 if n == 2 else None


def _own(sources: draws.Integers, me: int) -> list[Meeting]:
    """One node's row and column of (I + P) / 2, for each segment's permutation."""
    destinations = (sources == me).argmax(axis=1)
    return [
        one_way(source, destination)
        for source, destination in zip(sources[:, me].tolist(), destinations.tolist(), strict=True)
    ]


def _takers(choices: draws.Integers, me: int) -> list[list[int]]:
    """For each segment the nodes that chose `me`."""
    takers: list[list[int]] = [[] for _ in choices]
    places, nodes = np.nonzero(choices == me)
    for place, node in zip(places.tolist(), nodes.tolist(), strict=True):
        takers[place].append(node)
    return takers


# The draws of a round serve all nodes: one process may ask for many of them (the simulator).
@lru_cache(maxsize=16)
def fair_sources(n: int, seed: int, round: int, segments: Segments) -> draws.Integers:
    """Whom every node receives from by the roulette: shape (segments, n); see `Fair`."""
    sources = draws.permutations(n, seed, round, segments)
    places, nodes = np.nonzero(sources == np.arange(n))
    # A repair undoes fixed points and makes none, so those found now, in order, are all.
    for place, node in zip(places.tolist(), nodes.tolist(), strict=True):
        if node < n - 1 and sources[place, node] == node:
            again = draws.uniform_integer(n - 1 - node, seed, round, segments[place], n + node)
            _swap(sources, place, node, node + 1 + again)
    for place in np.flatnonzero(sources[:, n - 1] == n - 1).tolist():
        _swap(sources, place, n - 2, n - 1)
    sources.flags.writeable = False
    return sources


@lru_cache(maxsize=16)
def derangement_sources(n: int, seed: int, round: int, segments: Segments) -> draws.Integers:
    """Whom every node receives from by a uniform derangement: shape (segments, n)."""
    sources = draws.derangements(n, seed, round, segments)
    sources.flags.writeable = False
    return sources


@lru_cache(maxsize=16)
def free_choices(n: int, seed: int, round: int, segments: Segments) -> draws.Integers:
    """Every node's free choice among the others: shape (segments, n)."""
    distances = draws.uniform_integers(n - 1, seed, round, segments, n) + 1
    choices: draws.Integers = (np.arange(n) + distances) % n
    choices.flags.writeable = False
    return choices


def _swap(sources: draws.Integers, place: int, a: int, b: int) -> None:
    kept = int(sources[place, a])
    sources[place, a] = sources[place, b]
    sources[place, b] = kept
