"""A NaN or an infinity in one node's weights is named, or left out, and never spreads silently."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip_hvd.errors import ConfigError, NotFiniteError
from gossip_hvd.finite import finite
from gossip_hvd.methods import Crossover, Gossip, GossipPGA, Method
from gossip_hvd.mixing import Array
from gossip_hvd.node import Cluster
from gossip_hvd.segments import Field, Layout
from gossip_hvd.simulate import Simulation
from gossip_hvd.topology import RandomMatching, Ring

LAYOUT = Layout.blocks(
    [Field("stem", "float32", 37, 4, "stem"), Field("head", "float32", 90, 4, "head")]
)
ELEMENTS = LAYOUT.nbytes // 4
HEAD = LAYOUT.segments[1].start // 4
BAD = [np.nan, np.inf, -np.inf]


def simulation(method: Method, nodes: int = 4, ranks: int = 1, **options: object) -> Simulation:
    made = Simulation(Cluster.grouped(nodes * ranks, ranks), method, LAYOUT, **options)  # type: ignore[arg-type]
    rng = np.random.default_rng(nodes)
    made.fill(rng.integers(-500, 500, (nodes, ELEMENTS)).astype(np.float32))
    return made


def poison(sim: Simulation, node: int, value: float) -> None:
    for rank in sim.cluster.nodes[node]:
        sim.values(rank)[HEAD + 5] = value


def assert_close(actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@given(size=st.integers(1, 300), at=st.integers(0, 299), bad=st.sampled_from(BAD))
def test_one_bad_element_is_found_wherever_it_is(
    dtype: type, size: int, at: int, bad: float
) -> None:
    values = np.linspace(-3, 3, size).astype(dtype)
    assert finite(values)
    values[at % size] = bad
    assert not finite(values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_the_largest_numbers_are_finite(dtype: type) -> None:
    largest = np.array([ml_dtypes.finfo(dtype).max] * 9, dtype)
    assert finite(largest)
    assert finite(-largest)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize("wire", [None, "bfloat16"])
def test_raise_names_the_node_the_round_and_the_segment(
    bad: float, timing: str, wire: str | None
) -> None:
    sim = simulation(Crossover(peers="shift"), timing=timing, wire_dtype=wire)
    sim.step()
    poison(sim, 2, bad)
    with pytest.raises(NotFiniteError) as caught:
        for _ in range(3):
            sim.step()
        sim.drain()
    sentence = str(caught.value)
    assert re.search(r"rank \d \(node \d\), round [012], segment 'head'", sentence)
    assert "values of node 2 are not finite" in sentence


def test_ignore_lets_it_spread() -> None:
    sim = simulation(Crossover(), nan_policy="ignore")
    poison(sim, 2, np.nan)
    for _ in range(6):
        sim.step()
    assert all(np.isnan(row).any() for row in sim.nodes())


@pytest.mark.parametrize("timing", ["atc", "awc"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("topology", [Ring(), RandomMatching()], ids=str)
def test_skip_keeps_the_sum_of_the_others_and_mixes_them(
    topology: Ring | RandomMatching, ranks: int, timing: str
) -> None:
    sim = simulation(Gossip(topology), ranks=ranks, timing=timing, nan_policy="skip")
    others = [0, 1, 3]
    cells = sim.engines[0].seat.grid("segments").cells
    cell = next(c for c in cells if c.start <= 4 * (HEAD + 5) < c.stop)
    spoilt = np.zeros(ELEMENTS, bool)
    spoilt[cell.start // 4 : cell.stop // 4] = True
    before = sim.nodes()
    poison(sim, 2, np.nan)
    for _ in range(8):
        sim.step()
    sim.drain()
    after = sim.nodes()
    # Whole numbers of a few hundred; thirds of them are rounded, and half a loss would be tens.
    exact = before.astype(np.float64)
    healthy = after[others].astype(np.float64)
    assert np.isfinite(healthy).all()
    assert_close(healthy[:, spoilt].sum(0), exact[others][:, spoilt].sum(0))
    assert_close(after[:, ~spoilt].astype(np.float64).sum(0), exact[:, ~spoilt].sum(0))
    assert np.ptp(healthy[:, spoilt], axis=0).mean() < np.ptp(exact[others], axis=0).mean() / 2
    assert np.isnan(after[2, HEAD + 5])
    before[2, HEAD + 5] = np.nan
    assert np.array_equal(after[2, spoilt], before[2, spoilt], equal_nan=True)


@pytest.mark.parametrize("method", [Crossover(peers="shift"), GossipPGA(period=1)], ids=str)
def test_skip_is_refused_where_it_would_move_the_sum(method: Method) -> None:
    sim = simulation(method, nan_policy="skip")
    with pytest.raises(ConfigError, match="nan_policy='skip' needs mutual exchanges"):
        for _ in range(5):
            sim.step()
