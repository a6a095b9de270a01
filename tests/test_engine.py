"""The engine over the memory wire: NumPy's recursions bit by bit, the sum, debts, overlap."""

from __future__ import annotations

import contextlib
import random as stdlib_random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np
import pytest

from gossip_hvd.engine import Engine
from gossip_hvd.errors import ConfigError, StallError
from gossip_hvd.flight import Flight
from gossip_hvd.memory import PlainMemory
from gossip_hvd.methods import (
    METHODS,
    SGP,
    AllReduce,
    Crossover,
    Gossip,
    GossipPGA,
    Method,
    method_of,
)
from gossip_hvd.methods.contract import Context
from gossip_hvd.methods.crossover import PEERS
from gossip_hvd.methods.gossip import topology_of
from gossip_hvd.mixing import Array, dtype_of
from gossip_hvd.node import Cluster
from gossip_hvd.progress import CallerProgress, Steps, ThreadProgress, drive
from gossip_hvd.recorder import Recorder
from gossip_hvd.rounds import GRADIENTS, WEIGHTS, Round, Stage
from gossip_hvd.seat import Seat
from gossip_hvd.segments import ALIGN, Field, Layout
from gossip_hvd.simulate import Simulation
from gossip_hvd.topology import Custom, Ring
from gossip_hvd.watch import Patience, Watch

LAYOUT = Layout.blocks(
    [
        Field("stem.weight", "float32", 37, 4, "stem"),
        Field("block1.weight", "float32", 90, 4, "block1"),
        Field("block1.bias", "float32", 3, 4, "block1"),
        Field("head.weight", "float32", 16, 4, "head"),
    ]
)
ELEMENTS = LAYOUT.nbytes // 4
CUTS = [(span.start // 4, span.stop // 4) for span in LAYOUT.segments]
LOPSIDED = Custom.from_matrix(
    [[(0.4, 0.3, 0.2, 0.1, 0.0)[(i - j) % 5] for j in range(5)] for i in range(5)]
)
UNEVEN = Cluster(((0, 1), (2,), (3, 4, 5)))
WIRES = [None, "bfloat16", "float16"]


def equal_nodes(nodes: int, ranks: int = 1) -> Cluster:
    return Cluster.grouped(nodes * ranks, ranks)


def simulation(cluster: Cluster, method: Method | None = None, **options: Any) -> Simulation:
    """Small whole numbers as weights: float32 adds and halves them without rounding."""
    made = Simulation(cluster, method or Crossover(), options.pop("layout", LAYOUT), **options)
    rng = np.random.default_rng(len(cluster.nodes))
    made.fill(rng.integers(-500, 500, (len(cluster.nodes), ELEMENTS)).astype(np.float32))
    return made


def descend(node: int, x: Array) -> None:
    """A local step that depends on node and weights, and stays on whole numbers and halves."""
    x -= np.float32(node + 1) * (1 + np.arange(x.size, dtype=np.float32) % 3)


def descent(node: int) -> Array:
    """What ``descend`` takes away."""
    x = np.zeros(ELEMENTS, np.float32)
    descend(node, x)
    return -x.astype(np.float64)


def total(sim: Simulation) -> Array:
    """Σ over nodes, exact: sums of few-digit binary fractions in float64."""
    exact: Array = sim.nodes().astype(np.float64).sum(axis=0)
    return exact


def flying(engine: Engine) -> Steps:
    """A user's computation under which somebody polls, until the exchange in flight is over."""
    for flight in tuple(engine._flying):
        while not engine._progress.arrived(flight):
            yield flight


def all_ranks_equal(sim: Simulation, slot: str = WEIGHTS) -> bool:
    bits = [e.seat.memory[slot].tobytes() for e in sim.engines]
    return all(len({bits[r] for r in ranks}) == 1 for ranks in sim.cluster.nodes)


# Recursions, written by hand -------------------------------------------------------------------


def sources(method: Crossover, nodes: int, number: int) -> list[list[int]]:
    """By segment and node: whom the node receives from."""
    topology = PEERS[method.peers]
    return [
        [topology.peers(me, nodes, 0, number, s).receives[0][0] for me in range(nodes)]
        for s in range(len(CUTS))
    ]


def recursion(rows: Array, method: Crossover, steps: int, timing: str, wire: str | None) -> Array:
    """x ← Σ W (x − γd), or x ← Σ W x − γ d(x); float32, a line a formula."""
    x, half = rows.copy(), np.float32(0.5)
    snapshot: Array | None = None

    def merge(now: Array, snap: Array, number: int) -> Array:
        out = now.copy()
        sent = snap if wire is None else snap.astype(dtype_of(wire)).astype(np.float32)
        for (a, b), peer in zip(CUTS, sources(method, len(rows), number), strict=True):
            if snap is now and wire is None:
                out[:, a:b] = (now[:, a:b] + now[peer, a:b]) * half
            else:
                out[:, a:b] = now[:, a:b] + (sent[peer, a:b] - sent[:, a:b]) * half
        return out

    for k in range(steps):
        for node, row in enumerate(x):
            wander(node, row)
        if timing == "atc":
            x = merge(x, x, k)
        else:
            if snapshot is not None:
                x = merge(x, snapshot, k - 1)
            snapshot = x.copy()
    return x if snapshot is None else merge(x, snapshot, steps - 1)


def wander(node: int, x: Array) -> None:
    """A local step with all digits."""
    x -= np.float32(0.1) * np.sin(x + np.float32(node))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize("cluster", [equal_nodes(4), equal_nodes(3, 2)], ids=["4x1", "3x2"])
@pytest.mark.parametrize("peers", ["fair", "uniform", "shift"])
def test_engine_is_the_recursion_bit_by_bit(
    random: np.random.Generator, peers: str, cluster: Cluster, timing: str, wire: str | None
) -> None:
    method = Crossover(peers=peers)
    rows = random.standard_normal((len(cluster.nodes), ELEMENTS)).astype(np.float32)
    sim = simulation(cluster, method, timing=timing, wire_dtype=wire, order=3, largest=2 * ALIGN)
    sim.fill(rows)
    for _ in range(6):
        sim.step(wander)
    sim.drain()
    assert sim.nodes().tobytes() == recursion(rows, method, 6, timing, wire).tobytes()
    assert all_ranks_equal(sim)


@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize(
    "method",
    [Gossip("ring"), Gossip("one_peer_exponential"), Gossip(LOPSIDED), Crossover()],
    ids=["ring", "exponential", "lopsided", "crossover"],
)
def test_every_method_multiplies_by_its_matrix(method: Method, timing: str) -> None:
    """With step sizes of zero both orders are x ← W x, also with several peers."""
    n = 5
    if isinstance(method, Gossip):
        topology = topology_of(method.topology)
    else:
        assert isinstance(method, Crossover)
        topology = PEERS[method.peers]
    sim = simulation(equal_nodes(n), method, timing=timing, order=1)
    x = sim.nodes().astype(np.float64)
    for k in range(4):
        sim.step()
        for s, (a, b) in enumerate(CUTS):
            x[:, a:b] = topology.matrix(n, 0, k, s) @ x[:, a:b]
    sim.drain()
    np.testing.assert_allclose(sim.nodes(), x, atol=1e-3)


def test_overlapped_gossip_keeps_the_local_step_whole_for_nodes_that_nobody_takes_from() -> None:
    """x ← W x − γd also where a node receives and does not send (free choice of peers)."""
    n, method = 4, Crossover(peers="unfair")
    for seed in range(6):
        sim = simulation(equal_nodes(n), method, timing="awc", seed=seed)
        x = sim.nodes().astype(np.float64)
        sim.step()
        sim.step(descend)
        for s, (a, b) in enumerate(CUTS):
            x[:, a:b] = PEERS["unfair"].matrix(n, seed, 0, s) @ x[:, a:b]
        expected = x - np.stack([descent(node) for node in range(n)])
        np.testing.assert_array_equal(sim.nodes(), expected, f"seed {seed}")


@pytest.mark.parametrize("cluster", [equal_nodes(2), equal_nodes(2, 2), Cluster(((0, 1, 2), (3,)))])
@pytest.mark.parametrize("peers", ["fair", "uniform", "shift", "unfair"])
def test_two_nodes_meet_in_the_exact_mean(cluster: Cluster, peers: str) -> None:
    sim = simulation(cluster, Crossover(peers=peers))
    expected = sim.nodes().mean(axis=0)
    sim.step()
    for row in sim.nodes():
        assert row.tobytes() == expected.tobytes()


@pytest.mark.parametrize("cluster", [equal_nodes(3), equal_nodes(2, 3), UNEVEN])
def test_allreduce_gives_everyone_the_mean_gradient(cluster: Cluster) -> None:
    sim = simulation(cluster, AllReduce(), order=5)
    before = sim.nodes()
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((len(cluster.nodes), ELEMENTS)).astype(np.float32)
    sim.fill(gradients, GRADIENTS)
    sim.step()
    expected = gradients.astype(np.float64).mean(axis=0).astype(np.float32)
    for rank in range(cluster.size):
        assert sim.values(rank, GRADIENTS).tobytes() == expected.tobytes()
    assert sim.nodes().tobytes() == before.tobytes()


def test_allreduce_has_one_timing() -> None:
    with pytest.raises(ConfigError, match=r"timing='awc' does not fit method 'allreduce'"):
        simulation(equal_nodes(2), AllReduce(), timing="awc")


@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize("method", ["crossover", "gossip"])
def test_one_node_exchanges_nothing(method: str, timing: str) -> None:
    sim = simulation(equal_nodes(1, 3), method_of(method), timing=timing)
    before = sim.nodes()
    for _ in range(3):
        sim.step(descend)
    sim.drain()
    assert (sim.nodes() == before - 3 * descent(0)).all()
    assert all(e.alone and e.seat.record.bytes_sent == 0 for e in sim.engines)


# The sum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [ALIGN, 3 * ALIGN, 1 << 30])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("cluster", "timing", "staleness"),
    [
        (equal_nodes(4), "atc", 0),
        (equal_nodes(4), "awc", 0),
        (equal_nodes(4), "awc", 1),
        (equal_nodes(4), "awc", 3),
        (UNEVEN, "atc", 0),
        (UNEVEN, "awc", 0),
        (UNEVEN, "awc", 1),
        (UNEVEN, "awc", 3),
    ],
)
def test_the_sum_moves_by_exactly_minus_the_steps(
    cluster: Cluster, timing: str, staleness: int, wire: str | None, largest: int
) -> None:
    """Whole numbers: only the wire rounds, so Σx may not be off by a single bit."""
    sim = simulation(
        cluster, timing=timing, staleness=staleness, wire_dtype=wire, largest=largest, order=7
    )
    sim.board.slowest = 12
    # A stale round divides by 8: small numbers and few rounds keep every digit.
    nodes, steps = len(cluster.nodes), 4 if staleness else 6
    sim.fill(np.round(sim.nodes() / (50 if staleness else 1)))
    before = total(sim)
    step = sum(descent(node) for node in range(nodes))
    for k in range(steps):
        sim.step(descend)
        if not staleness:
            assert (total(sim) == before - (k + 1) * step).all()
    sim.drain()
    assert (total(sim) == before - steps * step).all()
    assert all_ranks_equal(sim)
    assert all(e.number == steps and not e.in_flight for e in sim.engines)
    assert sim.board.idle()


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_the_sum_holds_at_the_extremes_of_16_bits(wire: str) -> None:
    top, least = (6e4, 6e-8) if wire == "float16" else (1e30, 1e-38)
    sim = simulation(equal_nodes(4), timing="awc", wire_dtype=wire)
    values = np.array([top, -top, least, -least, 0, 1, 3, top / 3], np.float32)
    rng = np.random.default_rng(0)
    sim.fill(rng.choice(values, (4, ELEMENTS)))
    before = total(sim)
    for _ in range(4):
        sim.step()
    sim.drain()
    # A round and node: the difference and the result are each rounded once.
    bound = 4 * 4 * 2 * 2.0**-24 * top + 1e-44
    assert np.isfinite(sim.nodes()).all()
    assert np.abs(total(sim) - before).max() <= bound


def test_values_too_large_for_the_wire_are_refused_by_name() -> None:
    sim = simulation(equal_nodes(2), wire_dtype="float16")
    sim.fill(np.full((2, ELEMENTS), 1e5, np.float32))
    with pytest.raises(Exception, match="float16"):
        sim.step()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float32"])
def test_models_of_every_dtype(dtype: str) -> None:
    kind = dtype_of(dtype)
    layout = Layout.equal([Field("w", dtype, 300, kind.itemsize)], 3)
    sim = Simulation(equal_nodes(3, 2), Crossover(), layout, wire_dtype="bfloat16")
    size = layout.nbytes // kind.itemsize
    rows = np.random.default_rng(0).integers(-8, 8, (3, size)).astype(kind)
    sim.fill(rows)
    sim.step()
    after, off = sim.nodes().astype(np.float64), 0.0
    assert (after.sum(axis=0) == rows.astype(np.float64).sum(axis=0)).all()
    for s, span in enumerate(layout.segments):
        a, b = span.start // kind.itemsize, span.stop // kind.itemsize
        expected = PEERS["fair"].matrix(3, 0, 0, s) @ rows.astype(np.float64)[:, a:b]
        off = max(off, np.abs(after[:, a:b] - expected).max())
    assert off == 0


def test_a_model_of_several_dtypes() -> None:
    """Each dtype is mixed as itself; only float32 and float64 are rounded for the wire."""
    sizes = {"float32": 4, "bfloat16": 2, "float64": 8}
    layout = Layout.equal([Field(d, d, 100, n) for d, n in sizes.items()], 2)
    sim = Simulation(UNEVEN, Crossover(), layout, wire_dtype="bfloat16", order=2)
    rng = np.random.default_rng(1)

    def parts(rank: int) -> list[Array]:
        memory = sim.engines[rank].seat.memory[WEIGHTS]
        return [memory[a:b].view(dtype_of(d)) for a, b, d in layout.runs]

    for ranks in UNEVEN.nodes:
        values = [rng.integers(-50, 50, part.size) for part in parts(0)]
        for rank in ranks:
            for part, value in zip(parts(rank), values, strict=True):
                part[...] = value
    leaders = [ranks[0] for ranks in UNEVEN.nodes]

    def sums() -> list[Array]:
        every = [parts(rank) for rank in leaders]
        return [np.sum([p[i].astype(np.float64) for p in every], axis=0) for i in range(len(sizes))]

    before = sums()
    sim.step()
    for x, y in zip(before, sums(), strict=True):
        np.testing.assert_array_equal(x, y)
    assert all_ranks_equal(sim)


@pytest.mark.parametrize("elements", [1, 0])
@pytest.mark.parametrize("timing", ["atc", "awc"])
def test_the_smallest_models(timing: str, elements: int) -> None:
    layout = Layout.blocks([Field("w", "float32", elements, 4)])
    sim = Simulation(UNEVEN, Crossover(), layout, timing=timing)
    sim.fill(np.arange(3)[:, None] * np.ones((1, layout.nbytes // 4), np.float32))
    for _ in range(3):
        sim.step()
    sim.average()
    assert sim.nodes().shape == (3, layout.nbytes // 4)
    assert (sim.nodes() == 1).all()


# Delivery --------------------------------------------------------------------------------------


@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize(
    ("cluster", "seeds"), [(equal_nodes(3), 1500), (UNEVEN, 300)], ids=["3x1", "uneven"]
)
def test_no_order_of_delivery_changes_a_bit(cluster: Cluster, seeds: int, timing: str) -> None:
    layout = Layout.equal([Field("w", "float32", 48, 4)], 2)
    rows = np.random.default_rng(0).standard_normal((len(cluster.nodes), 48)).astype(np.float32)
    outcomes = set()
    for order in range(seeds):
        sim = Simulation(
            cluster, Crossover(), layout, timing=timing, order=order, slots=(), largest=ALIGN
        )
        sim.board.slowest = order % 9
        sim.fill(rows)
        for _ in range(2):
            sim.step(wander)
        sim.drain()
        assert sim.board.idle()
        outcomes.add(b"".join(sim.values(rank).tobytes() for rank in range(cluster.size)))
    assert len(outcomes) == 1


# Staleness -------------------------------------------------------------------------------------


class AlwaysLate(CallerProgress):
    """No exchange ever arrives before somebody waits for it."""

    def arrived(self, flight: Flight) -> bool:
        return False


def always_late(method: Method, rows: Array, staleness: int, **options: Any) -> Simulation:
    sim = simulation(equal_nodes(len(rows)), method, timing="awc", staleness=staleness, **options)
    sim.fill(rows)
    for engine in sim.engines:
        engine._progress = AlwaysLate()
    return sim


def test_staleness_posts_the_next_round_beside_a_late_one_and_bounds_how_long() -> None:
    sim = simulation(equal_nodes(4), timing="awc", staleness=2)
    sim.board.slowest = 60
    under_way = []
    for k in range(12):
        sim.step(descend)
        assert {(engine.number, engine.owed) for engine in sim.engines} == {(k + 1, 0)}
        for engine in sim.engines:
            rounds = [flight.round.number for flight in engine._flying]
            assert rounds[-1] == k
            assert rounds[0] >= k - 2
            assert len({id(flight.lane) for flight in engine._flying}) == len(rounds)
            under_way.append(len(rounds))
    assert min(under_way) == 1
    assert max(under_way) == 3
    sim.drain()
    assert not any(engine.in_flight for engine in sim.engines)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_stale_rounds_are_the_recursion_bit_by_bit(
    random: np.random.Generator, staleness: int, wire: str | None
) -> None:
    """Every round is merged ``staleness`` + 1 steps after it was posted, with damped weights."""
    method, steps = Crossover(), 7
    rows = random.standard_normal((4, ELEMENTS)).astype(np.float32)
    sim = always_late(method, rows, staleness, wire_dtype=wire)
    for _ in range(steps):
        sim.step(wander)
    sim.drain()

    x, weight = rows.copy(), np.float32(0.5 * {1: 1 / 2, 2: 1 / 4, 4: 1 / 8}[staleness])
    posted: list[tuple[int, Array]] = []

    def merge(k: int, snapshot: Array) -> None:
        sent = snapshot if wire is None else snapshot.astype(dtype_of(wire)).astype(np.float32)
        for (a, b), peer in zip(CUTS, sources(method, 4, k), strict=True):
            x[:, a:b] += (sent[peer, a:b] - sent[:, a:b]) * weight

    for k in range(steps):
        for node, row in enumerate(x):
            wander(node, row)
        if len(posted) > staleness:
            merge(*posted.pop(0))
        posted.append((k, x.copy()))
    for k, snapshot in posted:
        merge(k, snapshot)
    assert sim.nodes().tobytes() == x.tobytes()


@pytest.mark.parametrize("staleness", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("nodes", "topology"), [(2, "ring"), (4, "ring"), (4, "one_peer_exponential"), (5, "complete")]
)
def test_nodes_that_are_always_late_agree_in_the_end(
    nodes: int, topology: str, staleness: int
) -> None:
    """Undamped, each of these diverges or swings for ever (try ``damping`` = 1)."""
    rows = np.random.default_rng(1).standard_normal((nodes, ELEMENTS)).astype(np.float32)
    sim = always_late(Gossip(topology), rows, staleness)
    for _ in range(60 * (staleness + 1)):
        sim.step()
    sim.drain()
    np.testing.assert_allclose(sim.nodes(), np.tile(rows.mean(axis=0), (nodes, 1)), atol=1e-4)


@pytest.mark.parametrize("cluster", [equal_nodes(3), UNEVEN], ids=["3x1", "uneven"])
def test_no_order_of_delivery_loses_anything_of_stale_rounds(cluster: Cluster) -> None:
    layout = Layout.equal([Field("w", "float32", 48, 4)], 2)
    rows = np.random.default_rng(0).integers(-8, 8, (3, 48)).astype(np.float32)
    for order in range(300):
        sim = Simulation(
            cluster,
            Crossover(),
            layout,
            timing="awc",
            staleness=1 + order % 3,
            order=order,
            slots=(),
            largest=ALIGN,
        )
        sim.board.slowest = order % 60
        sim.fill(rows)
        for _ in range(4):
            sim.step()
        sim.drain()
        assert sim.board.idle()
        assert all_ranks_equal(sim)
        assert (total(sim) == rows.sum(axis=0)).all()


def test_an_exact_average_waits_for_all_that_is_under_way() -> None:
    rows = np.random.default_rng(2).standard_normal((3, ELEMENTS)).astype(np.float32)
    sim = always_late(GossipPGA(period=4), rows, 2)
    for k in range(8):
        sim.step(wander)
        assert [len(engine._flying) for engine in sim.engines] == [[1, 2, 3, 0][k % 4]] * 3
        assert (len({row.tobytes() for row in sim.nodes()}) == 1) == (k % 4 == 3)


def test_methods_that_need_what_a_round_brings_owe_the_next() -> None:
    rows = np.random.default_rng(3).standard_normal((4, ELEMENTS)).astype(np.float32)
    sim = always_late(SGP("random_push"), rows, 2)
    for _ in range(5):
        sim.step()
    assert [(engine.owed, len(engine._flying)) for engine in sim.engines] == [(2, 1)] * 4
    sim.drain()
    assert [engine.owed for engine in sim.engines] == [0] * 4


# Debts -----------------------------------------------------------------------------------------


def train(sim: Simulation, skips: dict[int, set[int]], steps: int) -> None:
    """Every rank at its own pace; ``skips`` names, by node, steps whose update does not happen.

    Whoever has its turn, all exchanges are polled, as progress threads would.
    """

    def rank_trains(rank: int) -> Steps:
        engine, node = sim.engines[rank], sim.cluster.node_of(rank)
        for k in range(steps):
            engine.reduced()
            if k not in skips.get(node, ()):
                descend(node, sim.values(rank))
                yield from engine.step()
        yield from engine.drain()

    draw = stdlib_random.Random(len(skips))
    going = {rank: rank_trains(rank) for rank in range(sim.cluster.size)}
    for _ in range(200_000):
        if not going:
            return
        rank = draw.choice(list(going))
        if next(going[rank], None) is None:
            del going[rank]
        for engine in sim.engines:
            next(flying(engine), None)
    raise AssertionError({rank: sim.engines[rank].owed for rank in going})


@pytest.mark.parametrize(
    ("cluster", "timing", "staleness"),
    [
        *product([equal_nodes(2), equal_nodes(3, 2), UNEVEN], ["atc", "awc"], [0]),
        *product([equal_nodes(2), equal_nodes(3, 2), UNEVEN], ["awc"], [1]),
    ],
)
@pytest.mark.parametrize(
    "skips", [{1: {0}}, {0: {1, 2}}, {0: {1}, 1: {2}}, {1: {4}}, {0: set(range(5))}], ids=str
)
def test_a_skipped_step_leaves_a_debt_and_nobody_waits_for_ever(
    skips: dict[int, set[int]], timing: str, staleness: int, cluster: Cluster
) -> None:
    """A loss scaler skips an optimizer step on one node: its round is run later."""
    sim = simulation(cluster, timing=timing, staleness=staleness, wire_dtype="bfloat16")
    before = total(sim)
    train(sim, skips, 5)
    taken = sum(
        (5 - len(skips.get(node, ()))) * descent(node) for node in range(len(cluster.nodes))
    )
    assert (total(sim) == before - taken).all()
    assert {(e.number, e.owed) for e in sim.engines} == {(5, 0)}
    assert all_ranks_equal(sim)
    assert sim.board.idle()


def test_a_round_is_a_reduction_not_a_step() -> None:
    sim = simulation(equal_nodes(2))
    for engine in sim.engines:
        engine.reduced()
        engine.reduced()
    sim.run([engine.step() for engine in sim.engines])
    assert [(engine.number, engine.owed) for engine in sim.engines] == [(2, 0)] * 2
    sim.run([engine.step() for engine in sim.engines])
    assert [engine.number for engine in sim.engines] == [2, 2]


# Drain, discard, average, distance -------------------------------------------------------------


def test_overlapped_gossip_begins_after_the_first_step_and_is_one_behind() -> None:
    sim = simulation(equal_nodes(3), timing="awc")
    rows = sim.nodes()
    assert not any(engine.in_flight for engine in sim.engines)
    sim.step(descend)
    moved = rows - np.stack([descent(node) for node in range(3)])
    assert (sim.nodes() == moved).all(), "nothing is merged yet"
    assert all(engine.in_flight for engine in sim.engines)
    sim.drain()
    assert not (sim.nodes() == moved).all()
    assert not any(engine.in_flight for engine in sim.engines)


@pytest.mark.parametrize("polled", [False, True])
def test_discard_forgets_the_exchange_in_flight(polled: bool) -> None:
    sim = simulation(UNEVEN, timing="awc")
    sim.step(descend)
    if polled:
        sim.run([flying(engine) for engine in sim.engines])
    kept = sim.nodes()
    sim.run([engine.discard() for engine in sim.engines])
    assert not any(engine.in_flight for engine in sim.engines)
    assert sim.nodes().tobytes() == kept.tobytes()
    assert sim.board.idle()
    new = kept + 1
    sim.fill(new)
    sim.step()
    assert sim.nodes().tobytes() == new.tobytes(), "the first exchange is posted after a step"
    sim.drain()
    assert (total(sim) == new.astype(np.float64).sum(axis=0)).all()


def test_discard_with_nothing_in_flight_does_nothing() -> None:
    sim = simulation(equal_nodes(2))
    sim.run([engine.discard() for engine in sim.engines])
    assert [engine.number for engine in sim.engines] == [0, 0]


def a_node_owes_a_round() -> tuple[Simulation, Array]:
    """Node 0 skipped its last step, node 1's second exchange is in flight; and Σx so far."""
    sim = simulation(equal_nodes(2), timing="awc")
    before = total(sim)
    sim.step()
    for engine in sim.engines:
        engine.reduced()
    sim.run([flying(sim.engines[0]), sim.engines[1].step()])
    assert [(engine.number, engine.owed) for engine in sim.engines] == [(1, 1), (2, 0)]
    return sim, before


def test_discard_pays_what_is_owed() -> None:
    """Else the other node's exchange never arrives."""
    sim, _ = a_node_owes_a_round()
    sim.run([engine.discard() for engine in sim.engines])
    assert [(engine.number, engine.owed) for engine in sim.engines] == [(2, 0)] * 2
    assert sim.board.idle()


def distance(sim: Simulation, *, turns: int = 100_000) -> float:
    means = [PlainMemory({WEIGHTS: e.seat.memory[WEIGHTS].copy()}) for e in sim.engines]
    pairs = list(zip(sim.engines, means, strict=True))
    sim.run([engine.deviation(mean) for engine, mean in pairs], turns)
    squares = [engine.squared_deviation(mean[WEIGHTS]) for engine, mean in pairs]
    return float((sum(squares) / len(sim.cluster.nodes)) ** 0.5)


def distance_or_refusal(sim: Simulation) -> None:
    """While something is owed or in flight the engine may refuse, and may not hang or spoil."""
    with contextlib.suppress(AssertionError, ConfigError):
        distance(sim)


def true_distance(rows: Array) -> float:
    off = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    return float(((off**2).sum() / len(rows)) ** 0.5)


@pytest.mark.parametrize("cluster", [equal_nodes(1, 2), equal_nodes(3), equal_nodes(4, 2), UNEVEN])
def test_consensus_distance_is_numpys(cluster: Cluster) -> None:
    sim = simulation(cluster)
    before = sim.nodes()
    assert distance(sim) == pytest.approx(true_distance(before), rel=1e-6)
    assert sim.nodes().tobytes() == before.tobytes()
    sim.average()
    assert distance(sim) == 0


def test_consensus_distance_of_a_drained_engine_is_that_of_its_weights() -> None:
    sim = simulation(equal_nodes(4), timing="awc")
    sim.step(descend)
    sim.drain()
    assert distance(sim) == pytest.approx(true_distance(sim.nodes()), rel=1e-6)


def test_consensus_distance_leaves_the_exchange_in_flight_whole() -> None:
    """Both need receive memory: whoever comes second may not take what the first has filled."""
    sim = simulation(equal_nodes(4), timing="awc")
    sim.step()
    before = total(sim)
    sim.run([flying(engine) for engine in sim.engines])
    distance_or_refusal(sim)
    sim.drain()
    assert (total(sim) == before).all()


def test_consensus_distance_with_a_debt_does_not_hang() -> None:
    sim, before = a_node_owes_a_round()
    distance_or_refusal(sim)
    sim.drain()
    assert (total(sim) == before).all()


@pytest.mark.parametrize("slot", [WEIGHTS, GRADIENTS])
def test_average_pays_what_is_owed(slot: str) -> None:
    sim, before = a_node_owes_a_round()
    sim.run([engine.average(slot) for engine in sim.engines])
    sim.drain()
    assert (total(sim) == before).all()


@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize("cluster", [equal_nodes(3), equal_nodes(5, 2), UNEVEN])
def test_average_is_the_exact_mean_in_the_same_bits_everywhere(
    cluster: Cluster, timing: str
) -> None:
    sim = simulation(cluster, timing=timing, wire_dtype="bfloat16", order=11)
    sim.step(wander)
    sim.drain()
    expected = sim.nodes().astype(np.float64).mean(axis=0).astype(np.float32)
    sim.average()
    for rank in range(cluster.size):
        assert sim.values(rank).tobytes() == expected.tobytes()


def test_average_drains_first() -> None:
    sim = simulation(equal_nodes(4), timing="awc")
    before = total(sim)
    sim.step()
    sim.average()
    assert (sim.nodes() == (before / 4).astype(np.float32)).all()
    assert not any(engine.in_flight for engine in sim.engines)


# Memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [equal_nodes(4), equal_nodes(3, 2), UNEVEN])
@pytest.mark.parametrize(
    ("timing", "wire", "received", "sent"),
    [
        ("atc", None, 1.0, 0.0),
        ("awc", None, 1.0, 1.0),
        ("atc", "bfloat16", 0.5, 0.5),
        ("awc", "float16", 0.5, 0.5),
    ],
)
def test_extra_memory_is_at_most_two_shares_in_the_wires_dtype(
    cluster: Cluster, timing: str, wire: str | None, received: float, sent: float
) -> None:
    layout = Layout.equal([Field("w", "float32", 50_000, 4)], 4)
    sim = Simulation(cluster, Crossover(), layout, timing=timing, wire_dtype=wire)
    for _ in range(5):
        sim.step()
    sim.drain()
    for engine in sim.engines:
        seat, share = engine.seat, engine.seat.share.nbytes
        cells = len(seat.grid("segments").cells)
        for arena, shares in ((seat.lanes[0].incoming, received), (seat.lanes[0].outgoing, sent)):
            assert shares * share <= arena.nbytes <= shares * (share + cells * ALIGN)


@pytest.mark.parametrize("staleness", [1, 3])
def test_every_round_that_may_be_under_way_has_memory_of_its_own(staleness: int) -> None:
    rows = np.zeros((4, ELEMENTS), np.float32)
    sim = always_late(Crossover(), rows, staleness)
    for _ in range(2 * staleness + 3):
        sim.step()
    sim.drain()
    for engine in sim.engines:
        share, cells = engine.seat.share.nbytes, len(engine.seat.grid("segments").cells)
        assert len(engine.seat.lanes) == staleness + 1
        for lane in engine.seat.lanes:
            for arena in (lane.incoming, lane.outgoing):
                assert share <= arena.nbytes <= share + cells * ALIGN


def test_a_round_sends_one_model_a_node() -> None:
    sim = simulation(UNEVEN)
    sim.step()
    for ranks in UNEVEN.nodes:
        records = [sim.engines[rank].seat.record for rank in ranks]
        shares = [sim.engines[rank].seat.share.nbytes for rank in ranks]
        between = [
            sum(e.nbytes for e in r.events if e.what == "sent" and e.peer not in ranks)
            for r in records
        ]
        assert between == shares
        assert sum(shares) == LAYOUT.nbytes


class CopiedMemory(PlainMemory):
    """Tensors that are no views of the flat bytes, which only load and save bring together."""

    def __init__(self, slots: dict[str, Any]) -> None:
        super().__init__(slots)
        self.tensors = {slot: flat.copy() for slot, flat in slots.items()}

    def load(self, slots: Iterable[str]) -> None:
        for slot in slots:
            self[slot][...] = self.tensors[slot]

    def save(self, slots: Iterable[str]) -> None:
        for slot in slots:
            self.tensors[slot][...] = self[slot]
            self[slot][...] = 0xEE  # whoever forgets to load will notice


@pytest.mark.parametrize("timing", ["atc", "awc"])
def test_copies_of_tensors_give_what_views_give(timing: str) -> None:
    views, copies = (simulation(equal_nodes(3, 2), timing=timing, order=4) for _ in range(2))
    for engine in copies.engines:
        engine.seat.memory = CopiedMemory(dict(engine.seat.memory.items()))
    for k in range(5):
        for sim in (views, copies):
            for rank, engine in enumerate(sim.engines):
                memory = engine.seat.memory
                tensors = memory.tensors if isinstance(memory, CopiedMemory) else memory
                wander(sim.cluster.node_of(rank), tensors[WEIGHTS].view(np.float32))
                engine.reduced()
            sim.run([engine.step() for engine in sim.engines])
            if k == 2:
                sim.average()
    views.drain()
    copies.drain()
    for rank, engine in enumerate(copies.engines):
        memory = engine.seat.memory
        assert isinstance(memory, CopiedMemory)
        assert memory.tensors[WEIGHTS].tobytes() == views.values(rank).tobytes()


# The contract with methods ---------------------------------------------------------------------


@dataclass(frozen=True)
class Counting(Crossover):
    """Crossover that passes notes and counts in its state what it was told."""

    name: ClassVar[str] = "counting"
    seen: ClassVar[list[tuple[int, dict[int, list[float]]]]] = []

    def note(self, state: Any, number: int, context: Context) -> list[float]:
        return [context.loss or 0.0, 7.0]

    def finish(self, state: Any, done: Round, own_note: Array, notes: Any) -> Any:
        self.seen.append((done.number, {node: note.tolist() for node, note in notes.items()}))
        return state


@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize("cluster", [equal_nodes(3), UNEVEN])
def test_notes_reach_every_rank_of_the_receiving_node(cluster: Cluster, timing: str) -> None:
    Counting.seen.clear()
    sim = simulation(cluster, Counting(), timing=timing, order=9)
    for rank, engine in enumerate(sim.engines):
        engine.loss = 10.0 + cluster.node_of(rank)
    sim.step()
    sim.drain()
    assert len(Counting.seen) == cluster.size
    assert all(
        number == 0 and notes == {node: [10.0 + node, 7.0] for node in notes} and notes
        for number, notes in Counting.seen
    )
    plain = simulation(cluster, timing=timing)
    plain.step()
    plain.drain()
    assert sim.nodes().tobytes() == plain.nodes().tobytes()


@dataclass(frozen=True)
class TwoStages(Gossip):
    """Two ring mixes in one round that does not call itself blocking."""

    def plan(self, state: Any, number: int, me: int) -> Round:
        (stage,) = super().plan(state, number, me).stages
        return Round(number, (stage, Stage(stage.sends, stage.receives)))


def test_a_round_of_several_stages() -> None:
    sim, once = simulation(UNEVEN, TwoStages("ring")), simulation(UNEVEN, Gossip("ring"))
    sim.step()
    once.step()
    once.step()
    assert sim.nodes().tobytes() == once.nodes().tobytes()


def test_a_round_of_several_stages_in_the_background_is_refused_or_works() -> None:
    sim, expected = (
        simulation(equal_nodes(3), TwoStages("ring"), timing=t) for t in ("awc", "atc")
    )
    expected.step()
    try:
        sim.step()
    except ConfigError:
        return
    sim.run([engine.drain() for engine in sim.engines])
    np.testing.assert_allclose(sim.nodes(), expected.nodes(), atol=1e-3)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_come_by_name(name: str) -> None:
    assert method_of(name) == METHODS[name]()
    assert method_of(METHODS[name]()).name == name


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'crosover'.*did you mean 'crossover'"):
        method_of("crosover")
    with pytest.raises(ConfigError, match=r"option of method 'crossover' 'peer'.*'peers'"):
        method_of("crossover", peer="fair")
    with pytest.raises(ConfigError, match=r"unknown peers 'far'.*did you mean 'fair'"):
        simulation(equal_nodes(2), Crossover(peers="far"))
    with pytest.raises(ConfigError, match=r"unknown topology 'rings'.*did you mean 'ring'"):
        simulation(equal_nodes(2), Gossip("rings"))
    with pytest.raises(ConfigError, match=r"options \['peers'\] beside a method object"):
        method_of(Crossover(), peers="fair")


def test_a_topology_object_is_taken_as_it_is() -> None:
    by_name, by_object = (simulation(equal_nodes(4), Gossip(t)) for t in ("ring", Ring()))
    by_name.step()
    by_object.step()
    assert by_name.nodes().tobytes() == by_object.nodes().tobytes()


# Waiting ---------------------------------------------------------------------------------------


def impatient(steps: Steps) -> None:
    """Drive with a watch that gives up at once."""
    watch = Watch(0, 1, "here", Patience(0.05, 0.05), lambda _: None)
    try:
        drive(steps)
    finally:
        watch.close()


@pytest.mark.parametrize("timing", ["atc", "awc"])
def test_a_wait_that_is_too_long_names_rank_round_segment_and_peer(timing: str) -> None:
    sim = simulation(equal_nodes(2, 2), timing=timing)
    sim.step()
    engine = sim.engines[1]
    engine.reduced()
    with pytest.raises(StallError) as caught:
        impatient(engine.drain())
    sentence = str(caught.value)
    number = 1 if timing == "atc" else 0
    assert f"rank 1 (node 0), round {number}, stage 0 (mix)" in sentence
    assert "rank 3 (node 1)" in sentence
    assert "messages outstanding" in sentence
    assert "GOSSIP_HVD_STALL_TIMEOUT" in sentence


def test_a_missing_segment_is_called_by_its_name() -> None:
    sim = simulation(equal_nodes(2))
    a, b = sim.engines
    a.reduced()
    b.reduced()
    ours, theirs = a.step(), b.step()
    next(theirs)  # both give their words, and then the other sends nothing
    with pytest.raises(StallError, match=r"segment 'stem': waits for data from rank 1 \(node 1\)"):
        impatient(ours)


# Overlap ---------------------------------------------------------------------------------------


def run_threads(bodies: list[Callable[[], None]]) -> None:
    """All at once; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


def with_threads(sim: Simulation, record: type[Recorder] = Recorder) -> list[Engine]:
    """The simulation's engines, each with a progress thread of its own."""
    made = []
    for old in sim.engines:
        old.seat.record = record()
        made.append(Engine(old.seat, old.method, timing=old.timing, progress=ThreadProgress()))
    return made


def test_threads_move_the_exchange_and_change_no_bit(random: np.random.Generator) -> None:
    method, cluster = Crossover(), equal_nodes(3, 2)
    sim = simulation(cluster, method, timing="awc")
    rows = random.standard_normal((3, ELEMENTS)).astype(np.float32)
    sim.fill(rows)
    engines = with_threads(sim)

    def body(rank: int) -> None:
        for _ in range(6):
            wander(cluster.node_of(rank), sim.values(rank))
            engines[rank].reduced()
            drive(engines[rank].step())
        drive(engines[rank].drain())

    run_threads([partial(body, rank) for rank in range(cluster.size)])
    assert sim.nodes().tobytes() == recursion(rows, method, 6, "awc", None).tobytes()
    assert all_ranks_equal(sim)
    for engine in engines:
        engine.close()
    assert not any(t.name == "gossip-progress" and t.is_alive() for t in threading.enumerate())


class Signalling(Recorder):
    """Lets a test wait until an exchange has been sent and received, however long it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = threading.Condition()

    def __call__(self, what: str, *details: int) -> None:
        with self.moved:
            super().__call__(what, *details)
            self.moved.notify_all()

    def counted(self, what: str) -> int:
        return sum(event.what == what for event in self.events)

    def wait_for_cells(self, cells: int) -> None:
        def moved() -> bool:
            return self.counted("sent") == self.counted("received") == cells

        with self.moved:
            assert self.moved.wait_for(moved, 20), "nothing moves while the caller computes"


def test_an_exchange_is_over_before_the_step_that_it_overlaps() -> None:
    """By order of events: sent and received under the computation, merged after its update."""
    cluster = equal_nodes(2)
    sim = simulation(cluster, timing="awc")
    engines = with_threads(sim, Signalling)

    def body(rank: int) -> None:
        engine = engines[rank]
        record = engine.seat.record
        assert isinstance(record, Signalling)
        for k in range(3):
            if k:  # forward and backward: they end when the bytes of the last round are over
                record.wait_for_cells(3 * k)
            record("update", engine._sequence, 0)
            descend(rank, sim.values(rank))
            engine.reduced()
            drive(engine.step())
        drive(engine.drain())

    run_threads([partial(body, rank) for rank in range(2)])
    for engine in engines:
        order = [(event.what, event.flight) for event in engine.seat.record.events]
        for flight in (1, 2):
            update = order.index(("update", flight))
            first = order.index(("send", flight))
            last = max(
                i for i, e in enumerate(order) if e in {("sent", flight), ("received", flight)}
            )
            assert order.index(("post", flight)) < first < last < update
            assert update < order.index(("mixed", flight)) < order.index(("post", flight + 1))
        engine.close()


def test_a_round_follows_the_last_one_cell_by_cell() -> None:
    """A cell that is merged and sent goes on its next journey while others are still awaited."""
    layout = Layout.equal([Field("w", "float32", ELEMENTS, 4)], 1)
    close = []
    for cluster, order in product((equal_nodes(3), equal_nodes(2, 2)), range(5)):
        options: dict[str, Any] = {"layout": layout, "largest": 64, "timing": "awc"}
        sim = simulation(cluster, order=order, **options)
        for _ in range(4):
            sim.step(descend)
        sim.drain()
        for engine in sim.engines:
            near = engine.seat.siblings
            across = [e for e in engine.seat.record.events if e.peer not in near]
            for flight in range(1, 4):
                first = next(e for e in across if (e.what, e.flight) == ("send", flight + 1))
                last = [e for e in across if (e.what, e.flight) == ("received", flight)][-1]
                close.append(across.index(first) < across.index(last))
    assert np.mean(close) > 0.5, "a rank may find all there when it comes"


def test_without_overlap_everything_is_over_when_the_step_returns() -> None:
    sim = simulation(equal_nodes(2), timing="atc")
    for k in range(1, 4):
        sim.step(descend)
        for engine in sim.engines:
            kinds = [event.what for event in engine.seat.record.events]
            assert [kinds.count(w) for w in ("send", "sent", "received", "mixed")] == [3 * k] * 4
            assert kinds[-1] == "done"


def test_an_error_under_way_reaches_the_caller() -> None:
    sim = simulation(equal_nodes(2), timing="awc")
    engine = with_threads(sim)[0]
    engine.reduced()

    def broken(handles: list[Any]) -> list[int]:
        raise ConnectionError("the cable is out")

    engine.seat.wire.test = broken  # type: ignore[method-assign]
    drive(engine.step())
    engine.reduced()
    with pytest.raises(ConnectionError, match="the cable is out"):
        drive(engine.step())
    engine.close()


def test_seats_know_their_place() -> None:
    sim = simulation(UNEVEN)
    seats: list[Seat] = [engine.seat for engine in sim.engines]
    assert [(s.node, s.index, s.ranks) for s in seats] == [
        (0, 0, 2),
        (0, 1, 2),
        (1, 0, 1),
        (2, 0, 3),
        (2, 1, 3),
        (2, 2, 3),
    ]
    for ranks in UNEVEN.nodes:
        carried = [seats[r].cells("segments", u) for r in ranks for u in range(len(CUTS))]
        indices = [cell.index for cells in carried for cell in cells]
        assert sorted(indices) == list(range(len(seats[0].grid("segments").cells)))
