"""What every topology promises, by enumeration; each law of a single one: test_topology_laws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip_hvd.errors import ConfigError
from gossip_hvd.topology import (
    ALONE,
    TOPOLOGIES,
    BaseGraph,
    BipartiteExponential,
    Custom,
    DirectedExponential,
    Dissemination,
    Hypercube,
    KPeerExponential,
    Meeting,
    ODEquiDyn,
    OnePeerExponential,
    OUEquiDyn,
    Rotated,
    SimpleBaseGraph,
    Topology,
    Torus,
    crossover,
    custom,
    gossipgrad,
    named,
    pairs,
)
from gossip_hvd.topology.contract import Segments

SIZES = range(1, 34)
SEGMENTS = (0, 1, 7)


def neighbours(n: int, seed: int, round: int, segment: int) -> list[int]:
    return [(i + 1 + (seed + round + segment) % max(1, n - 1)) % n for i in range(n)]


CASES: list[Topology] = [
    *(kind() for kind in TOPOLOGIES.values()),
    KPeerExponential(k=3),
    KPeerExponential(k=5, stagger=True),
    OnePeerExponential(stagger=True),
    DirectedExponential(k=2),
    Dissemination(stagger=True),
    Hypercube(skip=True),
    Hypercube(skip=True, stagger=True),
    Rotated(Hypercube(skip=True)),
    Rotated(BaseGraph()),
    Torus(rows=3),
    ODEquiDyn(eta=1.0),
    OUEquiDyn(eta=1.0),
    BaseGraph(k=2),
    BaseGraph(k=3),
    SimpleBaseGraph(k=2),
    Custom.from_function(neighbours),
]
STAGGERED = [case for case in CASES if getattr(case, "stagger", False)]
every_case = pytest.mark.parametrize("topology", CASES, ids=str)


def exists(topology: Topology, n: int) -> bool:
    try:
        topology.require(n)
    except ConfigError:
        return False
    return True


def sizes(topology: Topology) -> list[int]:
    found = [n for n in SIZES if exists(topology, n)]
    assert len(found) > 5
    return found


def product(topology: Topology, n: int, first: int, rounds: int, segment: int = 0) -> np.ndarray:
    result = np.eye(n)
    for round in range(first, first + rounds):
        result = topology.matrix(n, 5, round, segment) @ result
    return result


def clear_caches() -> None:
    crossover.fair_sources.cache_clear()
    crossover.derangement_sources.cache_clear()
    crossover.free_choices.cache_clear()
    pairs.shuffled_orders.cache_clear()
    gossipgrad._order.cache_clear()
    custom._called.cache_clear()


@every_case
def test_every_send_has_its_receive_and_sums_are_one(topology: Topology) -> None:
    for n in sizes(topology):
        for seed, round in ((0, 0), (1, 1), (0, 4), (-7, 1_000_003)):
            plans = [topology.plan(me, n, seed, round, SEGMENTS) for me in range(n)]
            for segment in range(len(SEGMENTS)):
                require_whole(topology, [plan[segment] for plan in plans])


def require_whole(topology: Topology, meetings: list[Meeting]) -> None:
    n = len(meetings)
    received = {(i, j): w for i, met in enumerate(meetings) for j, w in met.receives}
    sent = {(i, j): w for j, met in enumerate(meetings) for i, w in met.sends}
    assert received == sent
    assert len(received) == sum(len(met.receives) for met in meetings), "a peer met twice"
    rows, columns = np.zeros(n), np.zeros(n)
    for (i, j), w in received.items():
        assert i != j
        assert 0 <= j < n
        assert 0 < w <= 1
        rows[i] += w
        columns[j] += w
    own = np.array([topology.own_weight(met) for met in meetings])
    assert own.min() > -1e-12
    if topology.stochastic in ("doubly", "row"):
        assert np.abs(rows + own - 1).max() < 1e-12
    if topology.stochastic in ("doubly", "column"):
        assert np.abs(columns + own - 1).max() < 1e-12


@every_case
def test_check_agrees_and_the_matrix_is_the_meetings(topology: Topology) -> None:
    for n in (2, 6, 8, 9):
        if exists(topology, n):
            topology.check(n, seed=3, rounds=3, segments=2)
            w = topology.matrix(n, 3, 2, 1)
            for me in range(n):
                met = topology.peers(me, n, 3, 2, 1)
                row = np.zeros(n)
                row[[j for j, _ in met.receives]] = [weight for _, weight in met.receives]
                row[me] = topology.own_weight(met)
                assert w[me].tolist() == row.tolist()


@every_case
def test_many_segments_at_once_are_the_same_one_by_one(topology: Topology) -> None:
    for n in (*sizes(topology)[:9], sizes(topology)[-1]):
        for round in (0, 3, 77):
            me = round % n
            together = topology.plan(me, n, 4, round, 6)
            assert together == [topology.peers(me, n, 4, round, s) for s in range(6)]
            assert together[4:1:-2] == topology.plan(me, n, 4, round, [4, 2])
            assert topology.plan(me, n, 4, round, 0) == []


@every_case
def test_any_round_directly_is_the_same_as_in_order(topology: Topology) -> None:
    n = sizes(topology)[-1]
    in_order = [topology.plan(2, n, 9, round, 3) for round in range(40)]
    clear_caches()
    backwards = [topology.plan(2, n, 9, round, 3) for round in reversed(range(40))]
    assert in_order == backwards[::-1]


@every_case
def test_the_schedule_repeats_after_its_period(topology: Topology) -> None:
    for n in sizes(topology):
        period = topology.period(n)
        if period is None:
            rounds = [topology.plan(0, n, 1, round, 4) for round in range(30)]
            assert n < 4 or any(plan != rounds[0] for plan in rounds)
        else:
            for round in (0, 1, period - 1, 3 * period + 1):
                for me in (0, n // 2):
                    now = topology.plan(me, n, 1, round, 2)
                    assert now == topology.plan(me, n, 1, round + 5 * period, 2)


@every_case
def test_exactness_is_what_is_claimed(topology: Topology) -> None:
    for n in sizes(topology):
        claim, period = topology.exact_after(n), topology.period(n)
        mean = np.full((n, n), 1 / n)
        if claim is not None:
            for first in (0, 2 * (period or 1)):
                assert np.abs(product(topology, n, first, claim) - mean).max() < 1e-13, n
            # Not before: one round less leaves disagreement.
            if claim > 1 and period is not None:
                assert np.abs(product(topology, n, 0, claim - 1) - mean).max() > 1e-6, n
        elif period is not None and period < 20:
            # Where nothing is claimed, nothing is exact.
            assert np.abs(product(topology, n, 0, 2 * period) - mean).max() > 1e-13, n


@pytest.mark.parametrize("topology", STAGGERED, ids=str)
def test_staggered_segments_differ_and_are_exact_from_any_round(topology: Topology) -> None:
    for n in sizes(topology):
        claim, period = topology.exact_after(n), topology.period(n)
        assert period is not None
        for segment in range(min(period, 3)):
            ahead = topology.peers(0, n, 0, segment, 0)
            assert topology.peers(0, n, 0, 0, segment) == ahead
            if claim is not None:
                worst = np.abs(product(topology, n, 1, claim, segment) - 1 / n).max()
                assert worst < 1e-13


@every_case
def test_one_node_meets_nobody(topology: Topology) -> None:
    topology.require(1)
    assert topology.plan(0, 1, 0, 5, 3) == [ALONE] * 3
    assert topology.matrix(1).tolist() == [[1.0]]
    assert topology.period(1) == 1
    assert topology.exact_after(1) == 0
    topology.check(1)


@every_case
def test_topologies_are_plain_values(topology: Topology) -> None:
    assert type(topology).__name__ in repr(topology)
    assert hash(topology) == hash(topology)
    assert topology != Meeting()
    if type(topology) in TOPOLOGIES.values():
        assert eval(repr(topology), vars(__import__("gossip_hvd.topology").topology)) == topology


@every_case
def test_impossible_places_are_refused(topology: Topology) -> None:
    n = sizes(topology)[-1]
    for me, nodes, round in ((n, n, 0), (-1, n, 0), (0, 0, 0), (0, n, -1)):
        with pytest.raises(ConfigError, match="cannot plan"):
            topology.plan(me, nodes, 0, round, 1)


@pytest.mark.parametrize(
    ("topology", "n"),
    [(Hypercube(), 6), (BipartiteExponential(), 7), (Torus(rows=4), 6), (Rotated(Hypercube()), 12)],
)
def test_impossible_sizes_are_refused(topology: Topology, n: int) -> None:
    for ask in (topology.require, topology.period, topology.exact_after, topology.check):
        with pytest.raises(ConfigError, match=f"{n} nodes"):
            ask(n)
    with pytest.raises(ConfigError, match=f"{n} nodes"):
        topology.plan(0, n, 0, 0, 1)


@settings(max_examples=100)
@given(
    st.sampled_from(CASES),
    st.integers(1, 300),
    st.integers(-(2**65), 2**65),
    st.integers(0, 2**62),
    st.lists(st.integers(0, 2**63), min_size=1, max_size=3),
    st.data(),
)
def test_whoever_sends_is_expected(
    topology: Topology, n: int, seed: int, round: int, segments: list[int], data: st.DataObject
) -> None:
    if not exists(topology, n):
        return
    me = data.draw(st.integers(0, n - 1))
    for segment, met in zip(segments, topology.plan(me, n, seed, round, segments), strict=True):
        for peer, weight in met.sends[:3]:
            assert (me, weight) in topology.peers(peer, n, seed, round, segment).receives
        for peer, weight in met.receives[:3]:
            assert (me, weight) in topology.peers(peer, n, seed, round, segment).sends


@dataclass(frozen=True)
class Lying(Topology):
    """Everybody takes half of node 0, which sends what `told` says."""

    told: float = 0.5

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        if me:
            return [Meeting(((0, 0.5),), ())] * len(segments)
        return [Meeting((), tuple((j, self.told) for j in range(1, n)))] * len(segments)


def test_check_names_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"round 0, segment 0: column 0 of W sums to 2\b"):
        Lying().check(3)
    with pytest.raises(ConfigError, match=r"node 1 receives from node 0 with weight 0.5"):
        Lying(told=0.25).check(3)


def test_topologies_by_name() -> None:
    assert named("one_peer_exponential") == named("one-peer-exponential") == OnePeerExponential()
    assert named("base-graph", k=3) == BaseGraph(k=3)
    with pytest.raises(ConfigError, match="one_peer_exponential"):
        named("one-peer-exponentail")
    with pytest.raises(ConfigError, match="colour"):
        named("ring", colour="red")
    for refused in (lambda: named("base_graph", k=0), lambda: named("od_equidyn", eta=0.0)):
        with pytest.raises(ConfigError):
            refused()
