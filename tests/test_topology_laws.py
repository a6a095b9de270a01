"""The law of each single topology, against its paper: probabilities, contraction, exactness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from gossip_hvd import draws
from gossip_hvd.errors import ConfigError
from gossip_hvd.topology import (
    BaseGraph,
    BipartiteExponential,
    Ceca,
    Derangement,
    DirectedExponential,
    Dissemination,
    Fair,
    Grid,
    Hypercube,
    KPeerExponential,
    OnePeerExponential,
    OnePeerRing,
    OUEquiDyn,
    RandomMatching,
    RandomPush,
    Ring,
    Rotated,
    Shift,
    SimpleBaseGraph,
    StaticExponential,
    Topology,
    Torus,
    Unfair,
)
from gossip_hvd.topology.crossover import fair_sources
from gossip_hvd.topology.equitopo import _partner

Law = dict[tuple[int, ...], Fraction]


def roulette(n: int, rule: bool = True) -> Law:
    """Algorithm 2's exact probabilities, draw after draw, with the code's n-2 rule."""
    law: Law = {(): Fraction(1)}
    for i in range(n):
        after: Law = {}
        for taken, p in law.items():
            free = [j for j in range(n) if j not in taken and j != i]
            if rule and i == n - 2 and n - 1 not in taken:
                free = [n - 1]
            for j in free:
                after[(*taken, j)] = after.get((*taken, j), Fraction(0)) + p / len(free)
        law = after
    return law


def fair_law(n: int, monkeypatch: pytest.MonkeyPatch) -> Law:
    """The probabilities of `fair_sources` over all its possible draws, each followed once."""
    law: Law = {}
    for order in permutations(range(n)):
        monkeypatch.setattr(draws, "permutations", lambda *_, order=order: np.array([order]))
        open_scripts: list[tuple[int, ...]] = [()]
        while open_scripts:
            script = open_scripts.pop()
            bounds: list[int] = []

            def scripted(
                bound: int, *_: int, script: tuple[int, ...] = script, bounds: list[int] = bounds
            ) -> int:
                bounds.append(bound)
                return script[len(bounds) - 1] if len(bounds) <= len(script) else 0

            monkeypatch.setattr(draws, "uniform_integer", scripted)
            sources = tuple(fair_sources.__wrapped__(n, 0, 0, (0,))[0].tolist())
            if len(bounds) > len(script):
                open_scripts += [(*script, value) for value in range(bounds[len(script)])]
                continue
            p = Fraction(1, int(np.prod(range(1, n + 1))) * int(np.prod(bounds or [1])))
            law[sources] = law.get(sources, Fraction(0)) + p
    return law


def sources_of(topology: Topology, n: int, segments: int, seed: int = 1) -> np.ndarray:
    plans = [topology.plan(me, n, seed, 0, segments) for me in range(n)]
    return np.array([[met.receives[0][0] for met in plan] for plan in plans]).T


def chi_square(counts: Counter[tuple[int, ...]], law: Law) -> float:
    total = sum(counts.values())
    assert set(counts) <= set(law)
    return sum((counts[one] - total * float(p)) ** 2 / (total * float(p)) for one, p in law.items())


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_fair_has_exactly_the_roulettes_probabilities(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = roulette(n)
    assert sum(expected.values()) == 1
    assert fair_law(n, monkeypatch) == expected


def test_the_roulette_needs_its_repair_and_is_not_uniform() -> None:
    assert sum(roulette(3, rule=False).values()) < 1  # the last node found only itself
    law = roulette(8)
    to = [sum((p for s, p in law.items() if s[i] == j), Fraction(0)) for i, j in ((0, 1), (7, 6))]
    assert to[0] == Fraction(1, 7)
    assert float(max(to)) > 0.19  # the notes' simulation: 0.1145 .. 0.205 for n = 8


def test_fair_draws_by_the_roulettes_law() -> None:
    # 20000 segments of one round; the 1 - 1e-4 quantile of chi-square for 8 degrees of freedom.
    counts = Counter(map(tuple, sources_of(Fair(), 4, 20_000).tolist()))
    assert chi_square(counts, roulette(4)) < 31.8


def test_derangements_are_uniform_and_rounds_as_good_as_segments() -> None:
    without_fixed_point = (s for s in permutations(range(4)) if all(s[i] != i for i in range(4)))
    uniform = dict.fromkeys(without_fixed_point, Fraction(1, 9))
    assert len(uniform) == 9
    counts = Counter(map(tuple, sources_of(Derangement(), 4, 9000).tolist()))
    assert chi_square(counts, uniform) < 31.8
    counts = Counter(
        tuple(Derangement().peers(me, 4, 1, round).receives[0][0] for me in range(4))
        for round in range(4500)
    )
    assert chi_square(counts, uniform) < 31.8


@pytest.mark.parametrize("topology", [Fair(), Derangement(), Shift()], ids=str)
@pytest.mark.parametrize("n", [2, 3, 5, 16, 33, 257])
def test_sources_are_derangements(topology: Topology, n: int) -> None:
    sources = sources_of(topology, n, 20)
    assert (np.sort(sources, axis=1) == np.arange(n)).all()
    assert (sources != np.arange(n)).all()


def test_shift_is_one_uniform_distance() -> None:
    distances = (np.arange(6) - sources_of(Shift(), 6, 5000)) % 6
    assert (distances == distances[:, :1]).all()
    counts = np.bincount(distances[:, 0], minlength=6)
    assert counts[0] == 0
    assert ((counts[1:] - 1000) ** 2 / 1000).sum() < 23.5  # 1 - 1e-4, 4 degrees of freedom


def test_free_choices_are_uneven_and_reversed_by_push() -> None:
    loads = [len(met.sends) for me in range(8) for met in Unfair().plan(me, 8, 0, 0, 200)]
    assert {0, 1, 2, 3} <= set(loads)
    assert sum(loads) == 8 * 200
    assert np.array_equal(Unfair().matrix(8, 3, 2, 1).T, RandomPush().matrix(8, 3, 2, 1))
    chosen = Counter(met.receives[0][0] for met in Unfair().plan(3, 8, 0, 0, 7000))
    assert 3 not in chosen
    assert sum((c - 1000) ** 2 / 1000 for c in chosen.values()) < 27.9  # 1 - 1e-4, 6 degrees


@pytest.mark.parametrize("topology", [Derangement(), Shift(), RandomMatching()], ids=str)
@pytest.mark.parametrize("n", [4, 8, 16])
def test_disagreement_shrinks_as_in_theory(topology: Topology, n: int) -> None:
    # Mean of |W x|^2 / |x|^2 over 3000 segments, x centred: (n-2) / (2 (n-1)) within 4 %
    # (a single draw's spread is about 0.17, its mean's 0.003).
    x = np.random.default_rng(0).standard_normal(n)
    x -= x.mean()
    mixed = 0.5 * x + 0.5 * x[sources_of(topology, n, 3000)]
    ratio = (mixed**2).sum(axis=1).mean() / (x**2).sum()
    assert ratio == pytest.approx((n - 2) / (2 * (n - 1)), rel=0.04)


def test_fair_shrinks_disagreement_by_about_as_much() -> None:
    n = 8  # not uniform, so not exactly 3/7: .43 in the notes' simulation, within 10 % here
    x = np.random.default_rng(0).standard_normal((200, n))
    x -= x.mean(axis=1, keepdims=True)
    mixed = 0.5 * x[:, None] + 0.5 * x[:, sources_of(Fair(), n, 3000)]
    assert (mixed**2).sum() / 3000 / (x**2).sum() == pytest.approx(3 / 7, rel=0.1)


def test_small_fixed_graphs_by_hand() -> None:
    third = 1 / 3
    ring = [[third, third, 0, 0, third], [third, third, third, 0, 0], [0, third, third, third, 0]]
    assert Ring().matrix(5)[:3] == pytest.approx(np.array(ring))
    assert Ring().matrix(2) == pytest.approx(np.full((2, 2), 0.5))
    assert Ring().matrix(3) == pytest.approx(np.full((3, 3), third))
    line = [[2 / 3, third, 0], [third, third, third], [0, third, 2 / 3]]
    assert Grid().matrix(3) == pytest.approx(np.array(line))
    assert Grid().peers(4, 6, 0, 0).receives == ((1, 0.25), (3, 0.25), (5, 0.25))
    assert Torus().peers(4, 9, 0, 0).receives == ((1, 0.2), (3, 0.2), (5, 0.2), (7, 0.2))
    assert Torus().peers(0, 6, 0, 0).receives == ((3, 0.25), (2, 0.25), (1, 0.25))


@pytest.mark.parametrize("n", [4, 8, 12, 16, 32])
def test_static_exponential_has_its_known_gap(n: int) -> None:
    # rho = 1 - 2 / (2 + floor(log2(n-1))) for even n (Ying et al., Proposition 1).
    rho = np.linalg.norm(StaticExponential().matrix(n) - 1 / n, 2)
    assert rho == pytest.approx(1 - 2 / (2 + int(np.log2(n - 1))))


@pytest.mark.parametrize("n", [3, 4, 6, 8, 13])
def test_exponential_graphs_follow_their_equations(n: int) -> None:
    tau = int(np.ceil(np.log2(n)))
    for t in range(2 * tau):
        step = 2 ** (t % tau)
        for me in (0, n - 1):
            one = OnePeerExponential().peers(me, n, 0, t)
            assert one.receives == (((me - step) % n, 0.5),)
            assert one.sends == (((me + step) % n, 0.5),)
            assert Dissemination().peers(me, n, 0, t).receives == one.sends
            assert DirectedExponential().peers(me, n, 0, t) == one
    assert np.array_equal(KPeerExponential(1).matrix(n, 0, 1), OnePeerExponential().matrix(n, 0, 1))


def test_k_peers_are_exact_where_n_divides() -> None:
    exact = {(n, k) for n in range(2, 34) for k in (2, 3, 5) if KPeerExponential(k).exact_after(n)}
    assert {(9, 2), (27, 2), (16, 3), (8, 3), (32, 3), (12, 5), (6, 5), (18, 5)} <= exact
    assert (12, 2) not in exact
    assert KPeerExponential(3).peers(0, 2, 0, 0).receives == ((1, 0.5),)


def test_hypercube_may_skip_absent_peers() -> None:
    assert Hypercube().peers(5, 8, 0, 1).receives == ((7, 0.5),)
    assert Hypercube(skip=True).peers(4, 6, 0, 1).receives == ()


def test_one_peer_ring_alternates_and_rests_each_once() -> None:
    assert [OnePeerRing().peers(2, 6, 0, t).receives[0][0] for t in range(3)] == [3, 1, 3]
    resting = [
        me for t in range(7) for me in range(7) if not OnePeerRing().peers(me, 7, 0, t).sends
    ]
    assert sorted(resting) == list(range(7))
    met = [OnePeerRing().peers(me, 7, 0, t).sends for t in range(7) for me in range(7)]
    assert len([1 for sends in met if sends]) == 42


def test_bipartite_pairs_even_with_odd_at_its_distances() -> None:
    met = [BipartiteExponential().peers(0, 16, 0, t).receives[0][0] for t in range(8)]
    assert met == [1, 15, 3, 13, 5, 11, 9, 7]


@pytest.mark.parametrize("n", range(2, 22))
def test_equidyn_pairs_are_those_of_the_greedy_scan(n: int) -> None:
    for d in range(1, n):
        for start in range(n):
            partner: list[int | None] = [None] * n
            for i in ((start + step) % n for step in range(n)):
                j = (i + d) % n
                if partner[i] is None and partner[j] is None:
                    partner[i], partner[j] = j, i
            assert [_partner(me, n, d, start) for me in range(n)] == partner


def test_ou_equidyn_uses_all_distances_and_starts() -> None:
    met = Counter(one.receives[0][0] for one in OUEquiDyn().plan(0, 5, 0, 0, 4000) if one.receives)
    # Every other node equally often, and resting sometimes (odd n): 5 standard deviations.
    assert max(met.values()) - min(met.values()) < 5 * np.sqrt(2 * 800)
    assert 0 < 4000 - sum(met.values()) < 2400


def test_rotation_relabels_each_sweep_and_comes_round() -> None:
    n, tau = 8, 3
    rotated, plain = Rotated(), Dissemination()
    sweeps = []
    for sweep in range(n + 1):
        order = draws.permutation(n, 4, sweep % n)
        for t in range(sweep * tau, sweep * tau + tau):
            for place in range(n):
                ours = rotated.peers(order[place], n, 4, t)
                inner = plain.peers(place, n, 4, t)
                assert ours.receives == tuple((order[p], w) for p, w in inner.receives)
        sweeps.append([rotated.matrix(n, 4, sweep * tau + i).tolist() for i in range(tau)])
    assert sweeps[n] == sweeps[0]
    assert len({str(sweep) for sweep in sweeps}) == n


BASE_LENGTHS = {
    1: "3:3 5:5 6:4 7:5 9:7 10:6 12:5 15:7 17:9 20:7 24:6 25:9 30:8 31:9 48:7 63:11 100:11"
    " 2:1 4:2 8:3 16:4 32:5",
    2: "5:3 6:2 7:4 9:2 10:4 12:3 15:4 17:5 24:4 25:6 30:5 31:7 48:5 100:8",
}


@pytest.mark.parametrize("k", [1, 2])
def test_base_graphs_have_the_authors_lengths(k: int) -> None:
    for pair in BASE_LENGTHS[k].split():
        n, length = (int(number) for number in pair.split(":"))
        assert BaseGraph(k).period(n) == length, n
        simple = SimpleBaseGraph(k).period(n)
        assert simple is not None
        assert simple >= length


def test_hyper_hypercubes_take_the_fewest_rounds() -> None:
    # 216 = 6 6 6: three rounds with seven peers; the largest factors first (8 3 3 3) take four.
    assert BaseGraph(7).period(216) == 3


@pytest.mark.parametrize("kind", [BaseGraph, SimpleBaseGraph])
@pytest.mark.parametrize(("n", "k"), [(47, 1), (63, 1), (100, 1), (97, 2), (100, 4), (121, 3)])
def test_large_base_graphs_are_exact_with_at_most_k_peers(
    kind: Callable[[int], Topology], n: int, k: int
) -> None:
    graph = kind(k)
    tau = graph.exact_after(n)
    assert tau is not None
    x = np.random.default_rng(1).standard_normal(n)
    mixed = x
    for t in range(tau):
        w = graph.matrix(n, 0, t)
        assert np.array_equal(w, w.T)
        assert ((w > 0).sum(axis=1) - 1).max() <= k
        mixed = w @ mixed
    assert np.abs(mixed - x.mean()).max() < 1e-13


@pytest.mark.parametrize("ports", [1, 2])
@pytest.mark.parametrize("first_sweep", [0, 3])
def test_ceca_is_exact_for_every_n(ports: int, first_sweep: int) -> None:
    for n in range(2, 101, 2 if ports == 1 else 1):
        ceca = Ceca(ports)
        tau = ceca.exact_after(n)
        assert tau == ceca.period(n) == int(np.ceil(np.log2(n)))
        start = np.random.default_rng(n).standard_normal(n)
        x, others = start.copy(), np.full(n, 1e6)  # the first round must overwrite `others`
        for t in range(first_sweep * tau, first_sweep * tau + tau):
            met = [ceca.peers(me, n, t) for me in range(n)]
            assert all(met[one.destination or 0].source == me for me, one in enumerate(met))
            assert all(one.source != me for me, one in enumerate(met))
            if ports == 1:
                assert all(one.source == one.destination for one in met)
            got = (x if met[0].d else others)[[one.source for one in met]]
            a, b = met[0].x_weights
            c, e = met[0].others_weights
            x, others = a * x + b * got, c * others + e * got
        assert np.abs(x - start.mean()).max() < 1e-13
        excluding = (start.sum() - start) / (n - 1)
        assert np.abs(others - excluding).max() < 1e-12


def test_ceca_refuses_and_rests() -> None:
    with pytest.raises(ConfigError, match="odd"):
        Ceca(ports=1).peers(0, 5, 0)
    with pytest.raises(ConfigError, match="ports"):
        Ceca(ports=3)
    with pytest.raises(ConfigError, match="cannot plan"):
        Ceca().peers(5, 5, 0)
    alone = Ceca(ports=1).peers(0, 1, 9)
    assert (alone.source, alone.destination) == (None, None)
    assert alone.x_weights == alone.others_weights == (1.0, 0.0)
    assert (Ceca().period(1), Ceca().exact_after(1)) == (1, 0)
