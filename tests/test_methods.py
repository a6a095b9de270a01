"""Every registered method against one table of laws, on the real engine and the memory wire."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import reference
from reference import Dense

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
from gossip_hvd.rounds import GRADIENTS, MOMENTUM, VARIANCE, WEIGHTS
from gossip_hvd.segments import Field, Layout
from gossip_hvd.simulate import Simulation
from gossip_hvd.topology import (
    TOPOLOGIES,
    BaseGraph,
    Custom,
    Derangement,
    DirectedExponential,
    Dissemination,
    Fair,
    Hypercube,
    KPeerExponential,
    OnePeerExponential,
    RandomPush,
    Ring,
    Rotated,
    Topology,
    Unfair,
)

SEED = 7
STEPS = 9
MU = 0.6
BETA2 = 0.99
EPSILON = 1e-3
SLOTS = (GRADIENTS, MOMENTUM, VARIANCE)

SIZES = {1: (2,), 2: (1, 2), 3: (2, 1, 1), 4: (2, 2, 2, 2), 5: (1, 2, 1, 3, 1), 8: (1,) * 8}
"""Ranks of every node, by the number of nodes: uneven where that is possible."""

SHAPE = ((5, "a"), (9, "a"), (30, "b"), (2, "b"), (17, "c"), (1, "c"))
LAYOUT = Layout.blocks([Field(f"p{i}", "float64", k, 8, b) for i, (k, b) in enumerate(SHAPE)])
SEGMENT_OF = [
    next(i for i, s in enumerate(LAYOUT.segments) if s.start <= byte < s.stop)
    for byte in range(0, LAYOUT.nbytes, 8)
]
COLUMNS = len(SEGMENT_OF)


def cluster_of(sizes: Sequence[int]) -> Cluster:
    starts = np.cumsum([0, *sizes]).tolist()
    return Cluster(tuple(tuple(range(a, a + k)) for a, k in zip(starts, sizes, strict=False)))


# The table -------------------------------------------------------------------------------------


def dense(
    kind: type[Dense], topology: Topology | None = None, **extra: Any
) -> Callable[..., Dense]:
    """Makes the reference of a method over a topology, or over none."""

    def make(X: Any, **more: Any) -> Dense:
        n = len(X)
        identity = np.eye(n)
        mixing = lambda t, s: identity if topology is None else topology.matrix(n, SEED, t, s)  # noqa: E731
        known = {"mixing": mixing} if issubclass(kind, reference.Gossip) else {}
        return kind(X, SEGMENT_OF, **known, **extra, **more)

    return make


def two_then_one(X: Any, **more: Any) -> Dense:
    n, early, late = len(X), KPeerExponential(2), OnePeerExponential()
    mixing = lambda t, s: (early if t < 4 else late).matrix(n, SEED, t, s)  # noqa: E731
    return reference.Gossip(X, SEGMENT_OF, mixing=mixing, **more)


def uneven_push(n: int, seed: int, round: int, segment: int) -> Any:
    """Directed and time-varying; one node a round gives away three quarters."""
    P = np.zeros((n, n))
    for j in range(n):
        share = 0.75 if j == round % n else 0.5
        P[j, j] += 1 - share
        P[(j + 1 + round % (n - 1)) % n, j] += share
    return P


UNEVEN = Custom.from_function(uneven_push, "column")


@dataclass(frozen=True)
class Row:
    """One method, with options that show all of it within a few rounds.

    Attributes:
        method: what is tested.
        dense: makes its reference.
        even: whether it needs an even number of nodes.
        optimizer: of the local step.
        agrees: whether it pulls replicas together.
    """

    method: Method
    dense: Callable[..., Dense]
    even: bool = False
    optimizer: str = "SGD"
    agrees: bool = True


R = reference
ROWS: dict[str, Row] = {
    "none": Row(Silent(), dense(R.Dense), agrees=False),
    "allreduce": Row(METHODS["allreduce"](), dense(R.AllReduce)),
    "gossip": Row(Gossip(), dense(R.Gossip, OnePeerExponential())),
    "gossip ring": Row(Gossip("ring"), dense(R.Gossip, Ring())),
    "gossip base graph": Row(Gossip(BaseGraph(2)), dense(R.Gossip, BaseGraph(2))),
    "gossip derangement": Row(Gossip("derangement"), dense(R.Gossip, Derangement())),
    "gossip two peers early": Row(Gossip(peers={0: 2, 4: 1}), two_then_one),
    "gossip in turns": Row(Gossip(stream=2), dense(R.Gossip, OnePeerExponential(), stream=2)),
    "crossover": Row(Crossover(), dense(R.Gossip, Fair())),
    "crossover in turns": Row(Crossover(stream=3), dense(R.Gossip, Fair(), stream=3)),
    "ceca": Row(Ceca(), dense(R.Ceca)),
    "ceca 1-port": Row(Ceca(1), dense(R.Ceca, ports=1), even=True),
    "gossip_pga": Row(GossipPGA("crossover", 3), dense(R.PGA, Fair(), H=3)),
    "pga over sgp": Row(GossipPGA(SGP("random_push"), 3), dense(R.PeriodicSGP, RandomPush(), H=3)),
    "gossip_aga": Row(
        GossipAGA(initial=2, warm_up=4, longest=5), dense(R.AGA, OnePeerExponential())
    ),
    "local_sgd": Row(LocalSGD(period=3), dense(R.PGA, H=3)),
    "post_local_sgd": Row(PostLocalSGD(switch=4, period=3), dense(R.PGA, H=3, switch=4)),
    "gossipgrad": Row(GossipGraD(), dense(R.Gossip, Rotated(Dissemination()), slots=("X", "V"))),
    "gossipgrad cube": Row(
        GossipGraD("hypercube", rotate=False, payload="weights"),
        dense(R.Gossip, Hypercube(skip=True)),
    ),
    "gossipgrad gradients": Row(
        GossipGraD(payload="gradients"),
        dense(R.GradientGossip, Rotated(Dissemination())),
        agrees=False,
    ),
    "gossipgrad adam": Row(
        GossipGraD(),
        dense(R.Adam, Rotated(Dissemination()), slots=("X", "V", "S")),
        optimizer="Adam",
    ),
    "sgp": Row(SGP(), dense(R.SGP, DirectedExponential())),
    "sgp random push": Row(SGP("random_push"), dense(R.SGP, RandomPush())),
    "sgp uneven": Row(SGP(UNEVEN), dense(R.SGP, UNEVEN)),
    "slowmo": Row(SlowMo(period=3, beta=0.4, alpha=0.8), dense(R.SlowMo, H=3, beta=0.4, alpha=0.8)),
    "slowmo over gossip": Row(SlowMo("gossip", 3), dense(R.SlowMo, OnePeerExponential(), H=3)),
    "averaged_momentum": Row(
        AveragedMomentum("crossover"), dense(R.Gossip, Fair(), slots=("X", "V"))
    ),
    "averaged momentum, local": Row(
        AveragedMomentum(LocalSGD(period=3)), dense(R.PGA, H=3, slots=("X", "V"))
    ),
    "quasi_global": Row(QuasiGlobal(mu=MU), dense(R.QuasiGlobal, OnePeerExponential())),
    "quasi-global adam": Row(
        QuasiGlobal(mu=MU, beta2=BETA2),
        dense(R.QuasiGlobalAdam, OnePeerExponential()),
        optimizer="Adam",
    ),
    "decentlam": Row(DecentLaM(), dense(R.DecentLaM, Ring())),
    "decentlam damped": Row(DecentLaM(damping=0.02), dense(R.DecentLaM, Ring(), damping=0.02)),
    "dsgd_ac": Row(
        AdaptiveConsensus(floor=0.3),
        dense(R.AdaptiveConsensus, OnePeerExponential(), floor=0.3),
    ),
    "schedule": Row(Schedule({0: "allreduce", 4: "crossover"}), dense(R.WarmUp, Fair(), switch=4)),
}

CASES = [(name, timing) for name, row in ROWS.items() for timing in row.method.timings]
TABLE = [
    (*case, n) for case in CASES for n in SIZES if n % 2 == 0 or n == 1 or not ROWS[case[0]].even
]
cases = pytest.mark.parametrize(("name", "timing"), CASES)
each = pytest.mark.parametrize(("name", "timing", "n"), TABLE)


def test_every_registered_method_has_a_row() -> None:
    assert {row.method.name for row in ROWS.values()} == set(METHODS)


# Running a row ---------------------------------------------------------------------------------


def sgd(rate: float, mu: float = MU) -> Callable[[Mapping[str, Any]], None]:
    def step(slots: Mapping[str, Any]) -> None:
        v = slots[MOMENTUM]
        v[...] = mu * v + slots[GRADIENTS]
        slots[WEIGHTS][...] -= rate * v

    return step


def adam(rate: float) -> Callable[[Mapping[str, Any]], None]:
    def step(slots: Mapping[str, Any]) -> None:
        g, v, s = slots[GRADIENTS], slots[MOMENTUM], slots[VARIANCE]
        v[...] = MU * v + (1 - MU) * g
        s[...] = BETA2 * s + (1 - BETA2) * g**2
        slots[WEIGHTS][...] -= rate * v / (np.sqrt(s) + EPSILON)

    return step


OPTIMIZERS = {"SGD": sgd, "Adam": adam}


@dataclass
class Quadratic:
    """f_i(x) = ½ Σ h (x − b_i)²: the optimum of the nodes' mean is the mean of b."""

    b: Any
    h: Any

    @classmethod
    def draw(cls, n: int, spread: float, seed: int = 1) -> Quadratic:
        random = np.random.default_rng(seed)
        common = random.normal(size=COLUMNS)
        b = common + spread * random.normal(size=(n, COLUMNS))
        return cls(b, random.uniform(0.5, 1.5, COLUMNS))

    def of(self, node: int, x: Any) -> Any:
        return self.h * (x - self.b[node])

    def rows(self, X: Any) -> Any:
        return self.h * (X - self.b)


def simulation(row: Row, n: int, timing: str, *, start: Any = None, **options: Any) -> Simulation:
    method = row.method.fitted(row.optimizer)
    sim = Simulation(
        cluster_of(SIZES[n]), method, LAYOUT, seed=SEED, slots=SLOTS, timing=timing, **options
    )
    if start is None:
        start = np.broadcast_to(np.linspace(-1, 1, COLUMNS), (n, COLUMNS))
    sim.fill(start)
    return sim


def rate_at(t: int) -> float:
    return 0.1 if t < 5 else 0.05


def losses_at(t: int, n: int) -> list[float]:
    return [(4.0 + node) / (1 + t) for node in range(n)]


def train(sim: Simulation, row: Row, task: Quadratic, t: int, rate: float | None = None) -> None:
    rate = rate_at(t) if rate is None else rate
    sim.train(task.of, OPTIMIZERS[row.optimizer](rate), rate, losses_at(t, len(task.b)))


def assert_nodes_are_one(sim: Simulation) -> None:
    """Ranks of a node hold the same bits in every slot, and the same state."""
    for ranks in sim.cluster.nodes:
        for rank in ranks[1:]:
            for slot in (WEIGHTS, *SLOTS):
                assert np.array_equal(sim.values(ranks[0], slot), sim.values(rank, slot)), slot
            assert sim.engines[ranks[0]].state == sim.engines[rank].state


def masses(sim: Simulation) -> Any:
    """The push-sum masses of all nodes, ones for other methods."""
    found = []
    for ranks in sim.cluster.nodes:
        state = sim.engines[ranks[0]].state
        found.append(getattr(getattr(state, "base", state), "mass", 1.0))
    return np.array(found)[:, None]


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


@pytest.mark.parametrize("name", ["ring", "torus", "static_exponential"])
def test_a_fixed_graph_contracts_by_its_second_singular_value(name: str) -> None:
    n = 8
    W = TOPOLOGIES[name]().matrix(n)
    _, singular, right = np.linalg.svd(W - 1 / n)
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
    row = Row(method, dense(R.Dense))
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


def test_two_nodes_of_crossover_and_ceca_are_exact() -> None:
    for method in (Crossover(), Ceca(), Gossip()):
        X = run(method, 2)
        np.testing.assert_allclose(X[0], X[1], rtol=1e-13)


@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_ablation_without_fairness_is_the_dense_one_too(timing: str, n: int) -> None:
    """Row-stochastic: nodes that nobody chose only receive, and still merge what they had sent."""
    row, task = Row(Crossover("unfair"), dense(R.Gossip, Unfair())), Quadratic.draw(n, 1.0)
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
    n, row = 5, Row(SGP(topology), dense(R.SGP))
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
    n, row = 5, Row(method, dense(R.Dense))
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
        row = Row(GossipGraD(payload=payload), dense(R.Dense))
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
        sim = simulation(Row(method, dense(R.Dense)), n, "atc")
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
        row = Row(method, dense(R.Dense))
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
        row = Row(method, dense(R.Dense))
        sim = simulation(row, 4, "atc", start=np.random.default_rng(0).normal(size=(4, COLUMNS)))
        for t in range(4):
            train(sim, row, Quadratic.draw(4, 1.0), t, 0.0)
        assert np.isfinite(sim.nodes()).all()
        assert np.isfinite(sim.nodes(MOMENTUM)).all()


def test_aga_averages_less_often_as_the_loss_falls() -> None:
    row = Row(GossipAGA("gossip", initial=2, warm_up=4, longest=16), dense(R.Dense))
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
    sim = simulation(Row(method, dense(R.Dense)), 4, "atc")
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
        row = Row(method, dense(R.Dense))
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
        sim = simulation(Row(method, dense(R.Dense)), 4, "atc")
        with pytest.raises(ConfigError, match=says):
            sim.train(task.of, sgd(0.1))


def test_a_bad_custom_graph_is_refused_before_training() -> None:
    leaky = Custom.from_function(lambda n, seed, round, segment: np.full((n, n), 0.9 / n))
    with pytest.raises(ConfigError, match=r"sums to 0\.9"):
        Gossip(leaky).start(4, 1, 0)
