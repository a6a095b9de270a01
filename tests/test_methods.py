"""Every registered method against one table of laws, on the real engine and the memory wire."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import reference
from rows import (
    CASES,
    COLUMNS,
    LAYOUT,
    MU,
    ROWS,
    SEED,
    SLOTS,
    STAR,
    STEPS,
    TABLE,
    UNEVEN,
    Quadratic,
    Row,
    assert_nodes_are_one,
    dense,
    losses_at,
    masses,
    rate_at,
    sgd,
    simulation,
    train,
)

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods import (
    METHODS,
    SGP,
    AdaptiveConsensus,
    AveragedMomentum,
    Ceca,
    Crossover,
    DecentLaM,
    Gossip,
    GossipAGA,
    GossipGraD,
    GossipPGA,
    LocalSGD,
    Method,
    PostLocalSGD,
    QuasiGlobal,
    Schedule,
    Silent,
    SlowMo,
    method_of,
    restored,
)
from gossip_hvd.methods.contract import Context
from gossip_hvd.node import Cluster
from gossip_hvd.rounds import MOMENTUM, WEIGHTS
from gossip_hvd.segments import Field, Layout
from gossip_hvd.simulate import Simulation
from gossip_hvd.topology import (
    TOPOLOGIES,
    BaseGraph,
    Custom,
    Hypercube,
    KPeerExponential,
    OnePeerExponential,
    Topology,
    Unfair,
)

cases = pytest.mark.parametrize(("name", "timing"), CASES)
each = pytest.mark.parametrize(("name", "timing", "n"), TABLE)


def test_every_registered_method_has_a_row() -> None:
    assert {row.method.name for row in ROWS.values()} == set(METHODS)


def test_every_row_runs_on_every_size_and_timing_it_allows() -> None:
    for name, row in ROWS.items():
        ran = {(timing, n) for each, timing, n in TABLE if each == name}
        sizes = [n for n in (1, 2, 3, 4, 5, 8) if n % 2 == 0 or n == 1 or not row.even]
        assert ran == {(timing, n) for timing in row.method.timings for n in sizes}


# The laws --------------------------------------------------------------------------------------


@each
def test_laws_of_every_round(name: str, timing: str, n: int) -> None:
    """Dense reference; one plan for all; sends meet receives; weights add up; a node is one."""
    row, task = ROWS[name], Quadratic.draw(n, 1.0)
    sim = simulation(row, n, timing)
    known = row.dense(sim.nodes(), mu=MU, awc=timing == "awc")
    for t in range(STEPS):
        known.rate, known.losses = rate_at(t), losses_at(t, n)
        _check_plans(sim, t, column="sgp" in name)
        train(sim, row, task, t)
        known.step(task.rows)
        np.testing.assert_allclose(sim.nodes(), known.model(), rtol=1e-11, atol=1e-12)
        assert_nodes_are_one(sim)
        assert sim.board.idle() or timing == "awc"
    sim.drain()
    assert sim.board.idle()


def _check_plans(sim: Simulation, t: int, column: bool) -> None:
    """The round to come, as every rank plans it."""
    method, number, context = sim.engines[0].method, sim.engines[0].number, Context(rate_at(t), 1.0)
    plans = []
    for node, ranks in enumerate(sim.cluster.nodes):
        states = [method.observe(sim.engines[rank].state, number, context) for rank in ranks]
        made = [method.plan(state, number, node) for state in states]
        assert all(plan == made[0] for plan in made)
        plans.append(made[0])
    assert len({plan.blocking for plan in plans}) == 1
    for stage in range(max(len(plan.stages) for plan in plans)):
        parts = [plan.stages[stage] if plan.stages else None for plan in plans]
        sent = Counter(
            (i, x.peer, x.unit, x.slot, x.weight) for i, p in enumerate(parts) if p for x in p.sends
        )
        got = Counter(
            (x.peer, i, x.unit, x.slot, x.weight)
            for i, p in enumerate(parts)
            if p
            for x in p.receives
        )
        assert sent == got
        assert all(count == 1 for count in sent.values())
        if all(p is None or p.rule == "mix" for p in parts):
            _assert_stochastic(sent, column)


def _assert_stochastic(sent: Counter[Any], column: bool) -> None:
    given: Counter[Any] = Counter()
    taken: Counter[Any] = Counter()
    for sender, receiver, unit, slot, weight in sent:
        assert weight >= 0
        given[sender, unit, slot] += weight
        taken[receiver, unit, slot] += weight
    assert all(total <= 1 + 1e-12 for total in given.values())
    if not column:
        for key in {*given, *taken}:
            assert given[key] == pytest.approx(taken[key], abs=1e-12)


@cases
def test_the_mean_is_kept_and_disagreement_shrinks(name: str, timing: str) -> None:
    row, n = ROWS[name], 4 if ROWS[name].even else 5
    random = np.random.default_rng(3)
    sim = simulation(row, n, timing, start=random.normal(size=(n, COLUMNS)))
    still = Quadratic(np.zeros((n, COLUMNS)), np.zeros(COLUMNS))
    mean, first = sim.nodes().mean(axis=0), sim.nodes().std(axis=0).max()
    # These turn disagreement into momentum, of weights that differ from the start also in the mean.
    kept = row.method.name not in ("decentlam", "quasi_global", "slowmo")
    for t in range(STEPS):
        train(sim, row, still, t)
        w = masses(sim)
        assert w.sum() == n  # exactly: no mass is ever lost
        if kept:
            np.testing.assert_allclose((w * sim.nodes()).sum(axis=0), n * mean, atol=1e-12)
    if row.agrees and WEIGHTS in row.method.writes and kept and "in turns" not in name:
        assert sim.nodes().std(axis=0).max() < 0.6 * first


@cases
def test_an_exact_average_in_the_middle_counts_every_node_once(name: str, timing: str) -> None:
    """Also where a method sends something else than weights, or weighs nodes by their mass."""
    row, n = ROWS[name], 4 if ROWS[name].even else 5
    sim = simulation(row, n, timing, start=np.random.default_rng(3).normal(size=(n, COLUMNS)))
    for t in range(2):
        train(sim, row, Quadratic.draw(n, 1.0), t)
    sim.drain()
    mean = (masses(sim) * sim.nodes()).sum(axis=0) / n
    sim.average()
    np.testing.assert_allclose(sim.nodes(), np.broadcast_to(mean, (n, COLUMNS)), atol=1e-13)
    assert (masses(sim) == 1).all()
    assert len({sim.values(rank).tobytes() for rank in range(sim.cluster.size)}) == 1


@cases
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_converges_on_a_quadratic(name: str, timing: str, spread: float) -> None:
    row, n = ROWS[name], 4 if ROWS[name].even else 3
    task = Quadratic.draw(n, spread)
    method = row.method.fitted(row.optimizer)
    layout = Layout.equal([Field("p", "float64", COLUMNS, 8)], 1)
    flat = Cluster.grouped(n, 1)
    sim = Simulation(flat, method, layout, seed=SEED, slots=SLOTS, timing=timing)
    for t in range(120):
        train(sim, row, task, t, 0.1 / (1 + t / 20))
    sim.drain()
    X, best = sim.nodes(), task.b.mean(axis=0)
    error = np.abs((masses(sim) * X).mean(axis=0) - best).mean()
    if row.optimizer == "SGD":
        assert error < 0.01
    else:  # each node's own scaling weighs the nodes' gradients differently
        assert error < (0.1 if spread == 0 else 0.25)
    apart = np.abs(X - X.mean(axis=0)).mean()
    if row.agrees or spread == 0:
        assert apart < 0.15
    else:
        assert apart > 0.3


@cases
def test_resumes_bit_by_bit_from_plain_values(name: str, timing: str) -> None:
    row, n = ROWS[name], 4 if ROWS[name].even else 3
    task = Quadratic.draw(n, 1.0)
    sim = simulation(row, n, timing)
    for t in range(5):
        train(sim, row, task, t)
    sim.drain()
    again = simulation(row, n, timing, order=5)
    for old, new in zip(sim.engines, again.engines, strict=True):
        plain = json.loads(json.dumps(asdict(old.state)))
        new.state = restored(new.method.start(n, len(LAYOUT.segments), SEED), plain)
        assert new.state == old.state
        new.number, new.begun = old.number, True
        for kind in ("arrays", "replicas"):
            for key, array in getattr(old.seat, kind).items():
                getattr(new.seat, kind)[key][...] = array
        for slot in (WEIGHTS, *SLOTS):
            new.seat.memory[slot][...] = old.seat.memory[slot]
    for t in range(5, STEPS):
        train(sim, row, task, t)
        train(again, row, task, t)
    sim.drain()
    again.drain()
    assert np.array_equal(sim.nodes(), again.nodes())
    assert [e.state for e in sim.engines] == [e.state for e in again.engines]


@pytest.mark.parametrize("name", ROWS)
def test_options_are_plain_and_printable(name: str) -> None:
    method = ROWS[name].method
    assert json.dumps(method.options())
    assert " at 0x" not in f"{method}{method.options()}" or method.name == "sgp"
    assert method == method.with_options()


# Exactness, contraction and limits -------------------------------------------------------------


def apart_after(method: Method, n: int, rounds: int, columns: Layout = LAYOUT) -> float:
    """The largest deviation from the mean after so many rounds without gradients."""
    sim = Simulation(Cluster.grouped(n, 1), method, columns, seed=SEED)
    random = np.random.default_rng(n)
    sim.fill(random.normal(size=(n, columns.nbytes // 8)))
    for _ in range(rounds):
        sim.step()
    X = sim.nodes()
    return float(np.abs(X - X.mean(axis=0)).max())


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8, 12])
def test_ceca_is_exact_after_ceil_log2_rounds_for_any_n(n: int) -> None:
    rounds = math.ceil(math.log2(n))
    assert apart_after(Ceca(), n, rounds) < 1e-14
    assert apart_after(Ceca(), n, 2 * rounds) < 1e-14
    if n > 3:
        assert apart_after(Ceca(), n, rounds - 1) > 1e-3
    if n % 2 == 0:
        assert apart_after(Ceca(1), n, rounds) < 1e-14


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [
        (OnePeerExponential(), (2, 4, 8, 16)),
        (Hypercube(), (2, 4, 8, 16)),
        (BaseGraph(), (2, 3, 5, 6, 7, 12)),
        (BaseGraph(2), (3, 5, 9, 10)),
        (KPeerExponential(2), (3, 9)),
        (TOPOLOGIES["complete"](), (5,)),
    ],
)
def test_gossip_is_exact_where_a_theorem_says_so(topology: Topology, sizes: Sequence[int]) -> None:
    for n in sizes:
        rounds = topology.exact_after(n)
        assert rounds is not None
        assert apart_after(Gossip(topology), n, rounds) < 1e-13


@pytest.mark.parametrize("name", ["ring", "torus", "grid", "static_exponential", STAR])
def test_a_fixed_graph_contracts_by_its_second_singular_value(name: str | Topology) -> None:
    n = 8
    topology = TOPOLOGIES[name]() if isinstance(name, str) else name
    _, singular, right = np.linalg.svd(topology.matrix(n) - 1 / n)
    sim = Simulation(Cluster.grouped(n, 1), Gossip(name), LAYOUT)
    sim.fill(np.tile(right[0][:, None], COLUMNS))
    for power in range(1, 4):
        sim.step()
        X = sim.nodes()
        ratio = np.linalg.norm(X - X.mean(axis=0)) / math.sqrt(COLUMNS)
        assert ratio == pytest.approx(singular[0] ** power, rel=1e-9)


@pytest.mark.parametrize("peers", ["uniform", "shift"])
def test_crossovers_expected_contraction(peers: str) -> None:
    n, segments, rounds = 8, 64, 12
    layout = Layout.equal([Field("p", "float64", segments * 8, 8)], segments)
    sim = Simulation(Cluster.grouped(n, 1), Crossover(peers), layout, seed=SEED)
    sim.fill(np.random.default_rng(0).normal(size=(n, segments * 8)))
    ratios = []
    for _ in range(rounds):
        before = sim.nodes().var(axis=0).sum()
        sim.step()
        ratios.append(sim.nodes().var(axis=0).sum() / before)
    # Later rounds are dominated by the segments that happened to mix least: weigh all alike.
    assert np.mean(ratios[:4]) == pytest.approx((n - 2) / (2 * (n - 1)), rel=0.12)


def run(method: Method, n: int = 5, timing: str = "atc", steps: int = STEPS, **options: Any) -> Any:
    row = Row(method, dense(reference.Dense))
    sim = simulation(row, n, timing, **options)
    task = Quadratic.draw(n, 1.0)
    for t in range(steps):
        train(sim, row, task, t)
    return sim.nodes()


def test_limits_of_periodic_averages() -> None:
    assert np.array_equal(run(GossipPGA("crossover", math.inf)), run(Crossover()))
    assert np.array_equal(run(GossipPGA("none", 4)), run(LocalSGD(period=4)))
    assert np.array_equal(run(GossipPGA("crossover", 1)), run(GossipPGA("none", 1)))
    assert np.array_equal(run(PostLocalSGD(switch=0, period=4)), run(LocalSGD(period=4)))
    assert np.array_equal(run(SlowMo("gossip", 3, beta=0.0)), run(GossipPGA("gossip", 3)))
    push = SGP("random_push")
    assert np.array_equal(run(SlowMo(push, 3, beta=0.0)), run(GossipPGA(push, 3)))
    fixed = GossipAGA("gossip", initial=3, exponent=0.0)
    assert np.array_equal(run(fixed), run(GossipPGA("gossip", 3)))


def test_averaging_weights_in_every_round_is_allreduce_for_the_mean() -> None:
    np.testing.assert_allclose(
        run(LocalSGD(period=1)).mean(axis=0), run(method_of("allreduce"))[0], rtol=1e-12
    )


def test_no_power_no_damping_no_turns_change_nothing() -> None:
    assert np.array_equal(run(AdaptiveConsensus(power=0.0)), run(Gossip()))
    assert np.array_equal(run(Gossip(peers=1)), run(Gossip()))
    assert np.array_equal(run(Schedule({0: "gossip"})), run(Gossip()))
    assert np.array_equal(run(SGP()), run(Gossip()))  # regular graph: the mass stays 1


@pytest.mark.parametrize("name", ROWS)
def test_one_node_is_the_plain_optimizer(name: str) -> None:
    row = ROWS[name]
    assert np.array_equal(run(row.method.fitted("SGD"), 1), run(Silent(), 1))


def test_a_graph_that_never_changes_is_planned_once() -> None:
    """A complete graph of 1,024 nodes has 32,736 transfers in a round of 16 segments."""
    for method in (Gossip("complete"), SGP("ring"), GossipGraD(), method_of("allreduce")):
        state = method.start(8, 3, SEED)
        first, later = (method.plan(state, number, 2) for number in (0, 77))
        assert later.number == 77
        lasting = method.name != "gossipgrad"
        assert (later.stages[0] is first.stages[0]) == (later.stages == first.stages) == lasting


def test_two_nodes_of_crossover_and_ceca_are_exact() -> None:
    for method in (Crossover(), Ceca(), Gossip()):
        X = run(method, 2)
        np.testing.assert_allclose(X[0], X[1], rtol=1e-13)


@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_ablation_without_fairness_is_the_dense_one_too(timing: str, n: int) -> None:
    """Row-stochastic: nodes that nobody chose only receive, and still merge what they had sent."""
    row, task = Row(Crossover("unfair"), dense(reference.Gossip, Unfair())), Quadratic.draw(n, 1.0)
    sim = simulation(row, n, timing)
    known = row.dense(sim.nodes(), mu=MU, awc=timing == "awc")
    for t in range(STEPS):
        known.rate = rate_at(t)
        train(sim, row, task, t)
        known.step(task.rows)
        np.testing.assert_allclose(sim.nodes(), known.model(), rtol=1e-11, atol=1e-12)


# What single methods promise -------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["random_push", UNEVEN])
@pytest.mark.parametrize("staleness", [0, 2])
def test_sgp_keeps_all_mass_under_overlap(topology: Any, staleness: int) -> None:
    n, row = 5, Row(SGP(topology), dense(reference.SGP))
    sim = simulation(row, n, "awc", staleness=staleness)
    task = Quadratic.draw(n, 1.0)
    moved, start = np.zeros(COLUMNS), sim.nodes().sum(axis=0)
    for t in range(60):
        before = (masses(sim) * sim.nodes()).sum(axis=0)
        velocity = MU * sim.nodes(MOMENTUM) + task.rows(sim.nodes())
        train(sim, row, task, t)
        moved -= rate_at(t) * velocity.sum(axis=0)
        assert masses(sim).sum() == n
        now = (masses(sim) * sim.nodes()).sum(axis=0)
        np.testing.assert_allclose(now - before, -rate_at(t) * velocity.sum(axis=0), atol=1e-11)
    assert (masses(sim) != 1).any()
    sim.drain()
    total = (masses(sim) * sim.nodes()).sum(axis=0)
    np.testing.assert_allclose(total, start + moved, atol=1e-10)
    assert (masses(sim) > 0).all()


def test_sgp_masses_stay_exact_for_a_thousand_rounds() -> None:
    n = 7
    method = SGP("random_push")
    states = [method.start(n, 1, SEED) for _ in range(n)]
    for number in range(1000):
        notes = {i: np.array(method.note(s, number, Context())) for i, s in enumerate(states)}
        states = [
            method.finish(s, method.plan(s, number, i), notes[i], notes)
            for i, s in enumerate(states)
        ]
        assert sum(s.mass for s in states) == n  # type: ignore[attr-defined]
        assert all(s.mass > 0 for s in states)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", [Gossip(), Crossover(), Ceca(), SGP(UNEVEN), GossipGraD()])
@pytest.mark.parametrize("timing", ["atc", "awc"])
def test_a_rounded_wire_keeps_the_mean(method: Method, timing: str) -> None:
    n, row = 5, Row(method, dense(reference.Dense))
    start = np.random.default_rng(2).normal(size=(n, COLUMNS))
    sim = simulation(row, n, timing, start=start, wire_dtype="bfloat16")
    still = Quadratic(np.zeros((n, COLUMNS)), np.zeros(COLUMNS))
    for t in range(20):
        train(sim, row, still, t)
    np.testing.assert_allclose(
        (masses(sim) * sim.nodes()).sum(axis=0), start.sum(axis=0), atol=1e-11
    )
    assert sim.nodes().std(axis=0).max() < 0.1


def test_gradient_gossip_drifts_and_weight_gossip_does_not() -> None:
    apart = {}
    for payload in ("gradients", "weights"):
        random = np.random.default_rng(4)
        row = Row(GossipGraD(payload=payload), dense(reference.Dense))
        sim = simulation(row, 5, "atc")
        spread = []
        for _ in range(200):
            noise = {node: random.normal(size=COLUMNS) for node in range(5)}
            sim.train(lambda node, x, noise=noise: noise[node], sgd(0.01))
            spread.append(sim.nodes().var(axis=0).mean())
        apart[payload] = np.mean(spread[-20:]) / np.mean(spread[30:50])
    assert apart["gradients"] > 3  # a random walk: the variance grows with the rounds
    assert apart["weights"] < 2


def test_decentlam_takes_the_bias_of_momentum_away() -> None:
    """At a constant rate, nodes of different curvature: local momentum ends further off."""
    n, random = 8, np.random.default_rng(9)
    b, h = random.normal(size=(n, COLUMNS)), random.uniform(0.5, 1.5, (n, COLUMNS))
    best = (h * b).sum(axis=0) / h.sum(axis=0)
    errors = {}
    for method in (Gossip("ring"), DecentLaM()):
        sim = simulation(Row(method, dense(reference.Dense)), n, "atc")
        for _ in range(150):
            sim.train(lambda node, x: h[node] * (x - b[node]), sgd(0.05, mu=0.9), 0.05)
        errors[method.name] = np.abs(sim.nodes() - best).mean()
    assert errors["decentlam"] < 0.5 * errors["gossip"]


def test_parameters_may_have_learning_rates_of_their_own() -> None:
    """Each column follows its own rate: as if two models were trained."""
    rates = [0.1, 0.1, 0.02, 0.1, 0.02, 0.02]
    starts = [*LAYOUT.offsets, LAYOUT.nbytes]
    by_column = np.repeat(rates, np.diff(starts) // 8)
    n, task = 5, Quadratic.draw(5, 1.0)
    for method in (DecentLaM(), QuasiGlobal(mu=MU), SlowMo("gossip", 3)):
        row = Row(method, dense(reference.Dense))
        mixed = simulation(row, n, "atc")
        for _ in range(STEPS):
            mixed.train(task.of, sgd(by_column), rates)  # type: ignore[arg-type]
        for rate in set(rates):
            alone = simulation(row, n, "atc")
            for t in range(STEPS):
                train(alone, row, task, t, rate)
            mine = by_column == rate
            np.testing.assert_allclose(mixed.nodes()[:, mine], alone.nodes()[:, mine], rtol=1e-12)


def test_a_learning_rate_of_zero_divides_nothing() -> None:
    for method in (DecentLaM(), QuasiGlobal(), SlowMo(period=2)):
        row = Row(method, dense(reference.Dense))
        sim = simulation(row, 4, "atc", start=np.random.default_rng(0).normal(size=(4, COLUMNS)))
        for t in range(4):
            train(sim, row, Quadratic.draw(4, 1.0), t, 0.0)
        assert np.isfinite(sim.nodes()).all()
        assert np.isfinite(sim.nodes(MOMENTUM)).all()


def test_aga_averages_less_often_as_the_loss_falls() -> None:
    row = Row(GossipAGA("gossip", initial=2, warm_up=4, longest=16), dense(reference.Dense))
    sim = simulation(row, 4, "atc")
    task = Quadratic.draw(4, 0.0)
    periods = []
    for t in range(60):
        loss = 2.0 * 0.95**t
        sim.train(task.of, sgd(0.1), 0.1, [loss * (1 + node / 10) for node in range(4)])
        assert len({(e.state.period, e.state.initial_loss) for e in sim.engines}) == 1  # type: ignore[attr-defined]
        periods.append(sim.engines[0].state.period)  # type: ignore[attr-defined]
    assert periods[:4] == [2] * 4
    assert periods == sorted(periods)
    assert periods[-1] > 8


def test_agas_rule_can_be_replaced() -> None:
    method = GossipAGA(initial=2, warm_up=0, rule=lambda first, loss, initial, p, longest: 5)
    sim = simulation(Row(method, dense(reference.Dense)), 4, "atc")
    task = Quadratic.draw(4, 0.0)
    for _ in range(6):
        sim.train(task.of, sgd(0.1), losses=[1.0] * 4)
    assert sim.engines[0].state.period == 5  # type: ignore[attr-defined]


def test_bytes_sent_are_those_of_the_cost_lines() -> None:
    """One-peer methods send one model a node and round, PGA's mean 2M(n−1)/n."""
    n, model = 8, LAYOUT.nbytes
    for method, expected in (
        (Gossip(), 1.0),
        (Crossover(), 1.0),
        (Ceca(), 1.0),
        (SGP(), 1.0),
        (GossipGraD(), 2.0),
        (Gossip("ring"), 2.0),
        (Gossip(stream=3), 1 / 3),
        (METHODS["allreduce"](), 2 * (n - 1) / n),
        (LocalSGD(period=3), 2 * (n - 1) / n / 3),
        (Silent(), 0.0),
    ):
        row = Row(method, dense(reference.Dense))
        sim = simulation(row, n, "atc")
        for t in range(6):
            train(sim, row, Quadratic.draw(n, 1.0), t)
        sent = [e.seat.record.bytes_sent for e in sim.engines]
        notes = 8 * 6 * n if isinstance(method, SGP) else 0
        assert sum(sent) - notes == pytest.approx(6 * n * model * expected, rel=1e-9), method


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Gossip("random_push").start(4, 1, 0), "sgp"),
        (lambda: Gossip("unfair").start(4, 1, 0), "ablation"),
        (lambda: SGP("unfair").start(4, 1, 0), "row-stochastic"),
        (lambda: Gossip("rong").start(4, 1, 0), "did you mean 'ring'"),
        (lambda: Gossip("ring", peers=2).start(4, 1, 0), "no variant"),
        (lambda: Gossip(peers={3: 1}).start(4, 1, 0), "round 0"),
        (lambda: Gossip(stream=0).start(4, 1, 0), "stream=0"),
        (lambda: Gossip("hypercube").start(6, 1, 0), "power of two"),
        (lambda: Ceca(1).start(5, 1, 0), "odd"),
        (lambda: Crossover("fare").start(4, 1, 0), "did you mean 'fair'"),
        (lambda: GossipPGA(period=0).start(4, 1, 0), "whole number"),
        (lambda: GossipPGA("gosip").start(4, 1, 0), "did you mean 'gossip'"),
        (lambda: GossipGraD(payload="all").start(4, 1, 0), "payload"),
        (lambda: GossipGraD().fitted("Adagrad"), "knows SGD, Adam, AdamW"),
        (lambda: QuasiGlobal().fitted("LBFGS"), "knows SGD"),
        (lambda: DecentLaM().fitted("Adam"), "knows SGD"),
        (lambda: AveragedMomentum(GossipPGA(base=DecentLaM())).start(4, 1, 0), "weights alone"),
        (lambda: AdaptiveConsensus("ceca").start(4, 1, 0), "more than mix"),
        (lambda: Schedule({5: "gossip"}).start(4, 1, 0), "round 0"),
        (lambda: method_of("gossip_pga", perod=3), "did you mean 'period'"),
    ],
)
def test_bad_options_are_refused_by_name(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_what_a_method_needs_must_be_reported() -> None:
    task = Quadratic.draw(4, 1.0)
    for method, says in ((DecentLaM(), "learning rate"), (GossipAGA(), "loss")):
        sim = simulation(Row(method, dense(reference.Dense)), 4, "atc")
        with pytest.raises(ConfigError, match=says):
            sim.train(task.of, sgd(0.1))


def test_a_bad_custom_graph_is_refused_before_training() -> None:
    leaky = Custom.from_function(lambda n, seed, round, segment: np.full((n, n), 0.9 / n))
    with pytest.raises(ConfigError, match=r"sums to 0\.9"):
        Gossip(leaky).start(4, 1, 0)
