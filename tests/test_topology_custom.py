"""Topologies of one's own: graphs, matrices, functions, and what is refused about them."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip_hvd import draws
from gossip_hvd.errors import ConfigError
from gossip_hvd.topology import Custom, Ring, Shift

HALF = np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]])


@settings(max_examples=40)
@given(st.integers(1, 15), st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_connected_graphs_become_doubly_stochastic(n: int, seed: int, density: float) -> None:
    graph = networkx.gnp_random_graph(n, density, seed=seed)
    networkx.add_path(graph, range(n))
    custom = Custom.from_graph(graph)
    custom.check(n)
    w = custom.matrix(n)
    assert np.allclose(w, w.T)
    for i, j in graph.edges:
        expected = 1 / (1 + max(graph.degree[i], graph.degree[j]))
        assert w[i, j] == pytest.approx(expected)
    assert (np.count_nonzero(w - np.diag(np.diag(w)))) == 2 * graph.number_of_edges()


def test_a_cycle_is_the_ring() -> None:
    assert Custom.from_graph(networkx.cycle_graph(6)).matrix(6) == pytest.approx(Ring().matrix(6))


def test_self_loops_and_edge_weights_do_not_count() -> None:
    graph = networkx.path_graph(3)
    graph.add_edge(0, 0)
    graph[0][1]["weight"] = 17.0
    plain = Custom.from_graph(networkx.path_graph(3))
    assert Custom.from_graph(graph) == plain


def test_graphs_that_cannot_agree_are_refused() -> None:
    with pytest.raises(ConfigError, match="directed"):
        Custom.from_graph(networkx.DiGraph([(0, 1), (1, 0)]))
    with pytest.raises(ConfigError, match="not connected"):
        Custom.from_graph(networkx.Graph([(0, 1), (2, 3)]))
    with pytest.raises(ConfigError, match="not connected"):
        Custom.from_graph(networkx.Graph())


def test_matrices_take_turns() -> None:
    custom = Custom.from_matrices([HALF, np.eye(3)])
    assert custom.period(3) == 2
    assert custom.matrix(3, round=4).tolist() == HALF.tolist()
    assert custom.matrix(3, round=7).tolist() == np.eye(3).tolist()
    assert custom.peers(1, 3, 0, 0).receives == ((0, 0.5), (2, 0.5))
    assert custom == Custom.from_matrices([HALF.tolist(), np.eye(3)])
    assert hash(custom) == hash(Custom.from_matrices([HALF, np.eye(3)]))
    assert repr(custom) == "Custom(2 of 3x3, 'doubly')"


def test_matrices_are_held_to_their_declaration() -> None:
    pull = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    with pytest.raises(ConfigError, match=r"matrix 0: column 0 of W sums to 1\.5, expected 1"):
        Custom.from_matrix(pull)
    with pytest.raises(ConfigError, match="row 0 of W sums to"):
        Custom.from_matrix(pull.T)
    with pytest.raises(ConfigError, match="column 0"):
        Custom.from_matrix(pull, stochastic="column")
    rows = Custom.from_matrix(pull, stochastic="row")
    rows.check(3)
    assert rows.matrix(3).tolist() == pull.tolist()
    columns = Custom.from_matrix(pull.T, stochastic="column")
    columns.check(3)
    assert columns.matrix(3).tolist() == pull.T.tolist()
    assert columns.stochastic == "column"


@pytest.mark.parametrize(
    ("w", "says"),
    [
        ([[1.5, -0.5], [-0.5, 1.5]], "row 0, column 1 of W is -0.5"),
        ([[float("nan"), 1.0], [1.0, 0.0]], "row 0, column 0 of W is nan"),
        ([[1.0, 0.0]], "square"),
        ([[1.0], [0.0, 1.0]], "square"),
        ([], "square"),
    ],
)
def test_what_is_no_mixing_matrix_is_refused(w: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Custom.from_matrix(w)  # type: ignore[arg-type]


def test_sizes_must_agree() -> None:
    with pytest.raises(ConfigError, match="one size"):
        Custom.from_matrices([np.eye(2), np.eye(3)])
    with pytest.raises(ConfigError, match="one or more"):
        Custom.from_matrices([])
    with pytest.raises(ConfigError, match="for 3 nodes, but 4 take part"):
        Custom.from_matrix(HALF).plan(0, 4, 0, 0, 1)
    assert Custom.from_matrix(HALF).plan(0, 1, 0, 0, 1)[0].receives == ()


def shifted(n: int, seed: int, round: int, segment: int) -> list[int]:
    distance = 1 + draws.uniform_integer(n - 1, seed, round, segment)
    return [(me - distance) % n for me in range(n)]


def test_a_function_of_sources() -> None:
    custom = Custom.from_function(shifted)
    for segment in range(5):
        ours, theirs = (t.matrix(7, 3, 11, segment) for t in (custom, Shift()))
        assert ours.tolist() == theirs.tolist()
    assert custom.period(7) is None
    assert "shifted" in repr(custom)


def test_a_function_may_name_several_sources_or_none() -> None:
    custom = Custom.from_function(lambda *_: [[1, 2], None, 0], stochastic="row")
    assert custom.matrix(3) == pytest.approx(
        np.array([[1 / 3, 1 / 3, 1 / 3], [0, 1, 0], [0.5, 0, 0.5]])
    )


def test_a_function_of_matrices() -> None:
    custom = Custom.from_function(lambda n, seed, round, segment: HALF if round % 2 else np.eye(n))
    assert custom.matrix(3, round=1).tolist() == HALF.tolist()
    assert custom.plan(0, 3, 0, 0, 2)[1].receives == ()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([1, 1, 1], "node 1 cannot receive from node 1"),
        ([1, 2, 3], "cannot receive from node 3"),
        ([1, 0], "for 3 nodes expected, got 2"),
        ([1, 0, 0], "round 4, segment 2: column 0"),
        (np.eye(2), "3 nodes expected, got 2"),
        (np.ones((3, 3)), "round 4, segment 2: row 0"),
    ],
)
def test_bad_answers_of_a_function_name_round_and_segment(answer: object, says: str) -> None:
    custom = Custom.from_function(lambda *_: answer)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match=says):
        custom.peers(0, 3, 0, 4, 2)
