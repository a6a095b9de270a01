"""Process sets, join, SyncBatchNorm, elastic, timeline: names that are more than one operation."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from rank import Rank
from ranks import Job, on_ranks

import gossip_hvd.torch as hvd
from gossip_hvd import session
from gossip_hvd.errors import OperationError
from gossip_hvd.gossip import running
from gossip_hvd.joining import TAIL

MANY = [Job(1), Job(1, "world"), Job(2), Job(4, "node", 2), Job(4, "world", 2)]
FOUR = [Job(4, "node", 2), Job(4, "node", 1)]


@on_ranks(FOUR)
def test_process_sets_across_nodes(me: Rank) -> None:
    ends = hvd.add_process_set(hvd.ProcessSet([0, 3]))
    middle = hvd.add_process_set([1, 2])
    mine = ends if me.rank in (0, 3) else middle
    other = middle if mine is ends else ends
    assert (mine.included(), other.included()) == (True, False)
    assert (mine.size(), mine.rank()) == (2, int(me.rank > 1))
    assert (hvd.global_process_set.size(), hvd.global_process_set.rank()) == (4, me.rank)
    for _ in range(3):
        assert hvd.allreduce(torch.tensor(me.rank), op=hvd.Sum, process_set=mine).item() == 3
        assert hvd.allreduce(torch.tensor(me.rank), op=hvd.Sum).item() == 6
    gathered = hvd.allgather(torch.tensor([me.rank]), process_set=mine)
    assert gathered.tolist() == mine.ranks
    assert (
        hvd.broadcast(torch.tensor(me.rank), mine.ranks[1], process_set=mine).item()
        == mine.ranks[1]
    )
    assert hvd.broadcast_object(me.rank, mine.ranks[0], process_set=mine) == mine.ranks[0]
    x = torch.ones(2, requires_grad=True)
    hvd.allreduce(x, op=hvd.Sum, process_set=mine).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
    hvd.barrier(process_set=mine)
    with pytest.raises(ValueError, match="not part of provided process set"):
        hvd.allreduce(torch.ones(1), process_set=other)
    with pytest.raises(ValueError, match="duplicate"):
        hvd.add_process_set([0, 3])
    with pytest.raises(ValueError, match="duplicate"):
        hvd.add_process_set(range(4))
    assert hvd.remove_process_set(ends)
    assert not hvd.remove_process_set(hvd.global_process_set)
    assert ends.process_set_id is None


@on_ranks([Job(4, "node", 2), Job(4, "world", 2)], bare=True)
def test_process_sets_given_to_init(me: Rank) -> None:
    odd, even = hvd.ProcessSet([1, 3]), hvd.ProcessSet([0, 2])
    hvd.init(process_sets=[odd, even], horovod_scope=me.job.scope, node_size=2)
    mine = odd if me.rank % 2 else even
    total = hvd.allreduce(torch.tensor([float(me.rank)]), op=hvd.Sum, process_set=mine)
    assert total.item() == sum(mine.ranks)
    node = hvd.node_process_set()
    assert (node.ranks, node.size(), node.rank()) == (me.nodes[me.node], 2, me.rank % 2)
    total = hvd.allreduce(torch.tensor([float(me.rank)]), op=hvd.Sum, process_set=node)
    assert total.item() == sum(node.ranks)
    root = node.ranks[1]
    assert hvd.broadcast(torch.tensor([me.rank]), root, process_set=node).item() == root


@on_ranks(MANY)
def test_join_waits_for_the_last_and_others_go_on(me: Rank) -> None:
    for i in range(me.rank + 1):
        total = hvd.allreduce(torch.ones(2), name=f"x{i}", op=hvd.Sum)
        assert total.tolist() == [me.size - i] * 2
    hvd.allreduce(torch.ones(1)) if me.rank == me.size - 1 else None
    assert hvd.join() == me.size - 1
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == me.size


@on_ranks([Job(2)])
def test_barrier_fails_with_horovods_error(me: Rank) -> None:
    operations = session.current().operations
    if me.rank == 0:
        with pytest.raises(hvd.HorovodInternalError, match="Mismatched collective operations"):
            hvd.barrier()
    else:
        one = {"shapes": [(1,)], "given": ("float32",)}
        other = operations.submit("allgather", operations.next_name("barrier"), **one)
        with pytest.raises(OperationError):
            other.wait()


@on_ranks([Job(2)])
def test_join_fails_with_horovods_error(me: Rank) -> None:
    for _ in range(me.rank * (TAIL + 1)):
        session.current().operations.step("a model")
    me.settle()
    with pytest.raises(hvd.HorovodInternalError, match="cannot follow"):
        hvd.join()


METHODS: list[dict[str, Any]] = [
    {"method": "crossover"},
    {"method": "allreduce"},
    {"method": "crossover", "timing": "awc"},
    {"method": "gossip_pga", "period": 2},
]


def uneven(me: Rank, **options: Any) -> tuple[torch.Tensor, int, int]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)
    random = torch.Generator().manual_seed(me.rank)
    for _ in range(3 + 2 * me.rank):
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=random)).square().mean().backward()
        optimizer.step()
    last = hvd.join()
    return model.weight.detach().clone(), last, optimizer.gossip.round


@on_ranks([Job(2), *FOUR, Job(4, "world", 2), Job(5, "node", 2), Job(5, "world", 2)])
def test_uneven_data_keeps_nodes_and_partners_going(me: Rank) -> None:
    # Twice, since what the first models counted, or left behind, must not disturb the second.
    for options in METHODS * 2:
        weight, last, rounds = uneven(me, **options)
        every = me.gather(weight)
        assert me.gather(last) == [last] * me.size
        assert last == me.size - 1 or options["method"] == "allreduce"
        for ranks in me.nodes:
            assert all(torch.equal(every[rank], every[ranks[0]]) for rank in ranks)
        if options["method"] == "allreduce":
            assert all(torch.equal(one, every[0]) for one in every)
        else:
            assert rounds == 3 + 2 * (me.size - 1)


@on_ranks([Job(4, "world", 2)])
def test_join_refuses_to_follow_optimizers_of_both_kinds(me: Rank) -> None:
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    kept = [
        hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), method=method
        )
        for model, method in zip(models, ("crossover", "allreduce"), strict=True)
    ]
    with pytest.raises(hvd.ConfigError, match="cannot follow both"):
        hvd.join()
    del kept


@on_ranks([Job(2), Job(4, "world", 2)])
def test_models_that_nobody_uses_any_more_are_gone(me: Rank) -> None:
    for options in METHODS:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        optimizer.gossip.drain()
        assert len(list(running())) == 1
        del model, optimizer
        gc.collect()
        assert not list(running())


@on_ranks([Job(2)])
def test_a_followed_step_has_a_gradient_of_zero(me: Rank) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), method="allreduce")
    for _ in range(1 + me.rank):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    hvd.join()
    # One step of both, and one of which rank 0 knows nothing: −1 − ½.
    assert model.weight.item() == -1.5


NODE_LAYERS = [Job(2, "node", 2), Job(4, "node", 2), Job(4, "world", 2), Job(2)]


@on_ranks(NODE_LAYERS)
def test_sync_batch_norm_is_batch_norm_of_the_nodes_batch(me: Rank) -> None:
    ranks = me.nodes[me.node]
    for shape, dtype in (((3,), torch.float64), ((3, 2, 2), torch.float32)):
        torch.manual_seed(0)
        batches = [torch.randn(2 + rank, *shape, dtype=dtype) * 3 + 100 for rank in range(me.size)]
        plain = (torch.nn.BatchNorm1d if len(shape) == 1 else torch.nn.BatchNorm2d)(3).to(dtype)
        torch.nn.init.uniform_(plain.weight)
        ours = hvd.SyncBatchNorm(3).to(dtype)
        ours.load_state_dict(copy.deepcopy(plain.state_dict()))
        whole = torch.cat([batches[rank] for rank in ranks]).requires_grad_()
        mine = batches[me.rank].clone().requires_grad_()
        start = sum(len(batches[rank]) for rank in ranks if rank < me.rank)
        part = slice(start, start + len(mine))
        expected, got = plain(whole), ours(mine)
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        (got * weights[part]).sum().backward()
        close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {}
        torch.testing.assert_close(got, expected[part], **close)
        torch.testing.assert_close(mine.grad, whole.grad[part], **close)
        torch.testing.assert_close(ours.running_mean, plain.running_mean, **close)
        torch.testing.assert_close(ours.running_var, plain.running_var, **close)
        assert ours.num_batches_tracked.item() == 1
        both = sum(dict(enumerate(me.gather(ours.weight.grad)))[rank] for rank in ranks)
        torch.testing.assert_close(both, plain.weight.grad, **close)
        ours.eval(), plain.eval()
        torch.testing.assert_close(ours(mine), plain(mine), **close)
    with pytest.raises(ValueError, match="at least 2D"):
        ours(torch.ones(3))


@on_ranks(MANY)
def test_elastic_classes(me: Rank) -> None:
    sampler = hvd.elastic.ElasticSampler(range(20), shuffle=False)
    parts = me.gather(list(sampler))
    assert sorted({i for part in parts for i in part}) == list(range(20))
    model = torch.nn.Linear(2, 1)
    model.weight.data.fill_(me.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (me.rank + 1))
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, batch=me.rank)
    state.sync()
    assert (model.weight[0, 0].item(), optimizer.param_groups[0]["lr"], state.batch) == (
        0.0,
        0.1,
        0,
    )
    state.batch = 7
    model.weight.data.fill_(5.0)
    state.restore()
    assert (state.batch, model.weight[0, 0].item()) == (0, 0.0)
    state.batch = 3
    state.commit()
    state.restore()
    assert state.batch == 3

    @hvd.elastic.run
    def train(state: object, more: int) -> int:
        return state.batch + more

    assert train(state, more=2) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOROVOD_ELASTIC", "1")
        with pytest.raises(hvd.ConfigError, match="without --min-np"):
            train(state, more=2)


class Count:
    """Something of the user's that is neither a model nor an optimizer."""

    value = 0


class CountHandler(hvd.elastic.state.StateHandler):
    """Counts up where it is synchronised."""

    def save(self) -> None:
        self.saved = self.value.value

    def restore(self) -> None:
        self.value.value = self.saved

    def sync(self) -> None:
        self.value.value += 1
        self.save()


@on_ranks([Job(1)])
def test_elastic_states_have_handlers_of_ones_own(me: Rank) -> None:
    before = hvd.elastic.state.get_handler_registry()
    hvd.elastic.state.set_handler_registry([(Count, CountHandler), *before])
    state = hvd.elastic.TorchState(model=torch.nn.Linear(1, 1), count=Count())
    hvd.elastic.state.set_handler_registry(before)
    state.sync()
    state.count.value = 5
    state.restore()
    assert state.count.value == 1


@on_ranks([Job(2)])
def test_timeline_is_horovods(me: Rank) -> None:
    with pytest.raises(ValueError, match="HOROVOD_TIMELINE=DYNAMIC"):
        hvd.start_timeline(str(Path("/tmp/unused")))


@on_ranks([Job(1), Job(2)])
def test_build_queries(me: Rank) -> None:
    assert hvd.mpi_built()
    assert hvd.mpi_enabled()
    assert hvd.mpi_threads_supported()
    for query in (hvd.gloo_enabled, hvd.nccl_built, hvd.ddl_built, hvd.ccl_built, hvd.cuda_built):
        assert query() in (True, False, 0)
    assert hvd.rocm_built() in (True, False)
