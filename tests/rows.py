"""The table of methods: a row a method, its dense reference, and what all rows are run with.

Tests of the laws on the memory wire are in ``test_methods.py``, those on MPI in
``test_methods_mpi.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import numpy as np
import reference
from reference import Dense

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
)
from gossip_hvd.node import Cluster
from gossip_hvd.rounds import GRADIENTS, MOMENTUM, VARIANCE, WEIGHTS
from gossip_hvd.segments import Field, Layout
from gossip_hvd.simulate import Simulation
from gossip_hvd.topology import (
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


def star(n: int, seed: int, round: int, segment: int) -> Any:
    """A hub with n − 1 neighbours of one neighbour each: weights that differ from node to node."""
    return Custom.from_graph(networkx.star_graph(n - 1)).matrix(n)


STAR = Custom.from_function(star)


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
    "gossip star": Row(Gossip(STAR), dense(R.Gossip, STAR)),
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
    "slowmo over sgp": Row(SlowMo(SGP("random_push"), 3), dense(R.SlowMoSGP, RandomPush(), H=3)),
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
