"""Who is who, and how a job is started and ended, in every arrangement."""

from __future__ import annotations

import os

import horovod.torch as horovod
import pytest
import torch
from rank import Rank
from ranks import ALL, ALONE, BOTH_SCOPES, Job, on_ranks

import gossip_hvd.torch as hvd

QUESTIONS = (
    hvd.rank,
    hvd.size,
    hvd.local_rank,
    hvd.local_size,
    hvd.cross_rank,
    hvd.cross_size,
    hvd.node,
    hvd.nodes,
    hvd.node_rank,
    hvd.node_size,
    hvd.node_process_set,
    hvd.barrier,
)


@on_ranks(ALL)
def test_everybody_knows_who_is_who(me: Rank) -> None:
    mine = me.nodes[me.node]
    assert (hvd.rank(), hvd.size()) == (me.rank, me.job.ranks)
    # All test ranks share one machine.
    assert (hvd.local_rank(), hvd.local_size()) == (me.rank, me.job.ranks)
    assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
    assert (hvd.node(), hvd.nodes()) == (me.node, len(me.nodes))
    assert (hvd.node_rank(), hvd.node_size()) == (mine.index(me.rank), len(mine))
    inside = (hvd.node_rank(), hvd.node_size())
    world = me.job.scope == "world"
    assert (horovod.rank(), horovod.size()) == ((me.rank, me.size) if world else inside)
    if len(mine) > 1:
        total = horovod.allreduce(
            torch.tensor([float(me.rank)]), op=horovod.Sum, process_set=hvd.node_process_set()
        )
        assert total.item() == sum(mine)
    else:
        assert hvd.node_process_set() is None


@on_ranks([*ALONE, *BOTH_SCOPES])
def test_init_twice_is_once_and_only_with_the_same_arguments(me: Rank) -> None:
    job = me.job
    assert hvd.is_initialized()
    hvd.init(horovod_scope=job.scope, node_size=job.node_size)
    other = "world" if job.scope == "node" else "node"
    with pytest.raises(hvd.ConfigError, match=r"another horovod_scope.*shutdown\(\) first"):
        hvd.init(horovod_scope=other, node_size=job.node_size)
    with pytest.raises(hvd.ConfigError, match="another node_size: "):
        hvd.init(horovod_scope=job.scope, node_size=(job.node_size or 0) + 7)
    assert hvd.size() == job.ranks


@on_ranks([Job(1), Job(4)], bare=True)
def test_init_forgotten_is_said(me: Rank) -> None:
    assert not hvd.is_initialized()
    for question in QUESTIONS:
        with pytest.raises(hvd.ConfigError, match=r"call hvd\.init\(\) first"):
            question()
    model = torch.nn.Linear(2, 2)
    with pytest.raises(hvd.ConfigError, match=r"call hvd\.init\(\) first"):
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(hvd.ConfigError, match=r"call hvd\.init\(\) first"):
        hvd.allreduce(torch.ones(1))
    with pytest.raises(hvd.ConfigError, match=r"call hvd\.init\(\) first"):
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    with pytest.raises(hvd.ConfigError, match=r"call hvd\.init\(\) first"):
        hvd.average_parameters(model)


@on_ranks([Job(1), Job(4), Job(5)], bare=True)
def test_init_works_again_after_shutdown(me: Rank) -> None:
    sizes = [size for size in (1, 2, 3, None, 2, 1) if size is None or size <= me.size]
    for size in sizes:
        for scope in ("node", "world"):
            hvd.init(horovod_scope=scope, node_size=size)
            assert hvd.node_size() <= (size or me.size)
            hvd.barrier()
            assert hvd.allreduce(torch.ones(3), op=hvd.Sum).tolist() == [me.size] * 3
            hvd.shutdown()
            assert not hvd.is_initialized()
            assert not horovod.is_initialized()
            hvd.shutdown()


@on_ranks([Job(1), Job(2)], bare=True)
def test_horovod_started_before_us_is_refused(me: Rank) -> None:
    horovod.init()
    with pytest.raises(hvd.ConfigError, match="Horovod is already initialised: replace"):
        hvd.init()
    me.settle()
    horovod.shutdown()
    hvd.init(node_size=1)
    assert hvd.size() == me.size


@on_ranks([Job(4)], bare=True)
def test_the_environment_chooses_and_arguments_beat_it(me: Rank) -> None:
    chosen = {"GOSSIP_HVD_NODE_SIZE": "2", "GOSSIP_HVD_SCOPE": "world"}
    try:
        os.environ.update(chosen)
        hvd.init()
        assert (hvd.nodes(), horovod.size()) == (2, 4)
        hvd.shutdown()
        hvd.init(node_size=1, horovod_scope="node")
        assert (hvd.nodes(), horovod.size()) == (4, 1)
        hvd.shutdown()
    finally:
        for name in chosen:
            del os.environ[name]
    hvd.init()
    assert (hvd.nodes(), horovod.size()) == (1, 4)


@on_ranks([Job(4)], bare=True)
def test_a_list_of_ranks_is_a_world_of_its_own(me: Rank) -> None:
    half = [0, 1] if me.rank < 2 else [2, 3]
    hvd.init(half, node_size=1)
    assert (hvd.rank(), hvd.size(), hvd.nodes()) == (me.rank % 2, 2, 2)
    total = hvd.allreduce(torch.tensor([float(me.rank)]), op=hvd.Sum)
    assert total.item() == sum(half)
    hvd.init(half, node_size=1)


@on_ranks([Job(4)], bare=True)
def test_a_communicator_is_a_world_of_its_own(me: Rank) -> None:
    from mpi4py import MPI

    half = MPI.COMM_WORLD.Split(me.rank % 2, me.rank)
    hvd.init(half, node_size=2)
    assert (hvd.rank(), hvd.size(), hvd.nodes()) == (me.rank // 2, 2, 1)
    hvd.shutdown()
    half.Free()


@on_ranks([Job(4, "world", 2)], bare=True)
def test_further_process_sets_live_beside_the_nodes(me: Rank) -> None:
    even, first = hvd.ProcessSet([0, 2]), hvd.ProcessSet([0, 1])
    hvd.init(process_sets=[even, first], horovod_scope="world", node_size=2)
    if me.rank in (0, 2):
        value = torch.tensor([float(me.rank)])
        assert hvd.allreduce(value, name="even", op=hvd.Sum, process_set=even).item() == 2
    node = hvd.node_process_set()
    assert node.ranks == me.nodes[me.node]
    total = hvd.allreduce(torch.tensor([1.0]), name="node", op=hvd.Sum, process_set=node)
    assert total.item() == 2
    hvd.init(process_sets=[even, first], horovod_scope="world", node_size=2)
