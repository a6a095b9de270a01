"""Nodes: which ranks share one, where each rank sits, and how much a node's gradient counts."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip_hvd.errors import ConfigError
from gossip_hvd.node import Cluster

hosts_ = st.lists(st.sampled_from("abcde"), min_size=1, max_size=12)


def consistent(cluster: Cluster) -> None:
    ranks = [rank for node in cluster.nodes for rank in node]
    assert sorted(ranks) == list(range(cluster.size))
    assert cluster.node_sizes == tuple(len(node) for node in cluster.nodes)
    for rank in ranks:
        node, index = cluster.node_of(rank), cluster.node_rank(rank)
        assert cluster.nodes[node][index] == rank


@given(st.integers(1, 20), st.integers(1, 20))
def test_consecutive_ranks_make_a_virtual_node(size: int, node_size: int) -> None:
    if node_size > size:
        return
    cluster = Cluster.grouped(size, node_size)
    consistent(cluster)
    assert cluster.size == size
    assert set(cluster.node_sizes[:-1]) <= {node_size}
    assert 1 <= cluster.node_sizes[-1] <= node_size
    assert [cluster.node_of(rank) for rank in range(size)] == [r // node_size for r in range(size)]


@pytest.mark.parametrize("node_size", [0, -1, 5])
def test_sizes_that_cannot_be_are_refused(node_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"node_size={node_size}: expected 1 to 4"):
        Cluster.grouped(4, node_size)


@given(hosts_)
def test_ranks_of_one_host_are_a_node(hosts: list[str]) -> None:
    cluster = Cluster.by_host(hosts)
    consistent(cluster)
    assert len(cluster.nodes) == len(set(hosts))
    for a in range(len(hosts)):
        for b in range(len(hosts)):
            assert (cluster.node_of(a) == cluster.node_of(b)) == (hosts[a] == hosts[b])


def test_ranks_need_not_be_consecutive() -> None:
    cluster = Cluster.by_host(["b", "a", "b", "a", "c"])
    assert cluster.nodes == ((0, 2), (1, 3), (4,))
    assert [cluster.node_rank(rank) for rank in range(5)] == [0, 0, 1, 1, 0]


@given(hosts_)
def test_the_mean_over_nodes_of_scaled_gradients_is_the_mean_over_ranks(hosts: list[str]) -> None:
    cluster = Cluster.by_host(hosts)
    gradients = [Fraction(7 * rank**2 + 1, rank + 3) for rank in range(cluster.size)]
    scaled = [
        Fraction(cluster.gradient_scale(node)).limit_denominator(1000)
        * sum(gradients[rank] for rank in ranks)
        / len(ranks)
        for node, ranks in enumerate(cluster.nodes)
    ]
    assert sum(scaled) / len(scaled) == sum(gradients) / cluster.size


def test_equal_nodes_scale_by_exactly_one() -> None:
    for size, node_size in ((4, 1), (4, 2), (9, 3), (7, 7), (21, 3)):
        cluster = Cluster.grouped(size, node_size)
        assert all(cluster.gradient_scale(n) == 1.0 for n in range(len(cluster.nodes)))
