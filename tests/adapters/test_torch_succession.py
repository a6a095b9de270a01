"""A model that is trained by one optimizer after another, or known under two names."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from academic import assert_nodes_equal, batch, mlp, plain, sgd, vector
from rank import Rank
from ranks import BOTH_SCOPES, ONE_NODE, Job, on_ranks

import gossip_hvd.torch as hvd
from gossip_hvd.gossip import running

JOBS = [*BOTH_SCOPES, Job(3, "node", 2), Job(3, "world", 2)]
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"timing": "awc"},
    {"method": "allreduce"},
    {"method": "allreduce", "op": hvd.Sum},
)


def wrapped(model: torch.nn.Module, optimizer: Any, **options: Any) -> Any:
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)


def steps(me: Rank, model: torch.nn.Module, optimizer: Any, first: int, count: int = 3) -> None:
    for step in range(first, first + count):
        plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))


def succeeds(me: Rank, old: str, options: dict[str, Any]) -> None:
    model, fresh = mlp(), mlp()
    optimizer = wrapped(model, sgd(model), **options)
    steps(me, model, optimizer, 0)
    kept = optimizer if old == "kept" else None
    if old == "deleted":
        del optimizer
    optimizer = wrapped(model, torch.optim.Adam(model.parameters(), lr=0.01), **options)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    alone = wrapped(fresh, torch.optim.Adam(fresh.parameters(), lr=0.01), **options)
    assert {gossip.key for gossip in running()} == {optimizer.gossip.key, alone.gossip.key}
    steps(me, model, optimizer, 3)
    steps(me, fresh, alone, 3)
    for one in (optimizer, alone):
        one.gossip.drain()
    assert torch.equal(vector(model), vector(fresh)), (options, old)
    assert optimizer.gossip.round == alone.gossip.round
    assert_nodes_equal(me, model)
    if kept is not None:
        assert not {"gossip", "zero_grad", "synchronize"} & vars(kept).keys()
        again = wrapped(model, kept, **options)
        steps(me, model, again, 6)
        again.gossip.drain()
        assert_nodes_equal(me, model)


@on_ranks(JOBS)
def test_a_second_optimizer_trains_as_if_it_were_the_first(me: Rank) -> None:
    for options in OPTIONS:
        for old in ("rebound", "kept", "deleted"):
            succeeds(me, old, options)


@on_ranks([Job(3, "node", 2)])
def test_an_optimizer_that_is_dropped_is_gone_at_once(me: Rank) -> None:
    model = mlp()
    optimizer = wrapped(model, sgd(model))
    steps(me, model, optimizer, 0)
    dropped = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert dropped() is None
        assert not list(running())
    finally:
        gc.enable()
    x, y = batch(me.rank, 0, torch.float64, 5, 3)
    if me.rank == 0:  # nobody else reduces
        replica = copy.deepcopy(model)
        for one in (model, replica):
            one.zero_grad()
            (one(x) - y).square().mean().backward()
        for mine, plain_one in zip(model.parameters(), replica.parameters(), strict=True):
            assert torch.equal(mine.grad, plain_one.grad)


@on_ranks([Job(3, "node", 2), *BOTH_SCOPES])
def test_an_optimizer_keeps_what_the_next_one_does_not_take(me: Rank) -> None:
    model = mlp()
    whole = wrapped(model, torch.optim.SGD(model.parameters(), lr=0.1), num_groups=1)
    steps(me, model, whole, 0)
    head = hvd.DistributedOptimizer(
        torch.optim.SGD(model[2].parameters(), lr=0.1), model.named_parameters()
    )
    assert {field.name for field in whole.gossip.layout.fields} == {"0.weight", "0.bias"}
    assert {field.name for field in head.gossip.layout.fields} == {"2.weight", "2.bias"}
    for step in range(3, 6):
        x, y = batch(me.rank, step, torch.float64, 5, 3)
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        head.step()
        model[2].zero_grad()
        whole.step()
        assert_nodes_equal(me, model)
    assert (whole.gossip.round, head.gossip.round) == (6, 3)


@on_ranks(JOBS)
def test_parameters_that_are_added_leave_their_optimizer(me: Rank) -> None:
    for options in OPTIONS[:3]:
        body, head = mlp(), torch.nn.Linear(3, 3).double()
        hvd.broadcast_parameters(head.state_dict(), 0)
        one = wrapped(body, sgd(body), **options)
        two = wrapped(head, sgd(head), **options)
        whole = torch.nn.Sequential(body, head)
        for step in range(5):
            if step == 2:
                one.add_param_group({"params": list(head.parameters())})
                assert list(running()) == [one.gossip]
                assert not hasattr(two, "gossip")
            plain(whole, one, *batch(me.rank, step, torch.float64, 5, 3))
            assert_nodes_equal(me, whole)
            for ranks in me.nodes:  # what an uneven node's gradient is scaled by, once
                every = me.gather(head.weight.grad)
                assert all(torch.equal(every[rank], every[ranks[0]]) for rank in ranks)
        one.gossip.drain()
        assert one.gossip.round == (0 if one.gossip.delegated else 5)
        assert_nodes_equal(me, whole)


@on_ranks([Job(1), *BOTH_SCOPES])
def test_names_of_parameters_stand_where_horovod_keeps_them(me: Rank) -> None:
    body, head = mlp(), torch.nn.Linear(3, 3).double()
    groups = [{"params": list(layer.parameters())} for layer in (body[0], body[2])]
    unnamed = hvd.DistributedOptimizer(torch.optim.SGD(groups, lr=0.1))
    names = unnamed._parameter_names
    assert list(map(id, names)) == list(map(id, body.parameters()))
    assert len(set(names.values())) == 4
    assert hvd.allgather_object(set(names.values())) == [set(names.values())] * me.size
    whole = torch.nn.Sequential(body, head)
    named = hvd.DistributedOptimizer(
        torch.optim.SGD(body[0].parameters(), lr=0.1), whole.named_parameters()
    )
    named.add_param_group({"params": list(head.parameters())})
    assert set(named._parameter_names.values()) == {"0.0.weight", "0.0.bias", "1.weight", "1.bias"}
    assert named._parameter_names[head.weight] == "1.weight"
    assert set(map(id, names)) == set(map(id, body[2].parameters()))
    copied = copy.deepcopy(named)
    assert not hasattr(copied, "_parameter_names")
    last = wrapped(body[2], torch.optim.SGD(body[2].parameters(), lr=0.1))
    assert set(last._parameter_names.values()) == {"weight", "bias"}
    assert not hasattr(unnamed, "_parameter_names")


class Tied(torch.nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one = torch.nn.Linear(5, 5, bias=False).double()
        self.other = torch.nn.Linear(5, 5, bias=False).double()
        self.other.weight = self.one.weight
        self.last = torch.nn.Linear(5, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.other(torch.tanh(self.one(x)))))


@on_ranks([Job(1), *BOTH_SCOPES, Job(3, "node", 2)])
def test_a_parameter_with_two_names_is_reduced_and_sent_once(me: Rank) -> None:
    for options in OPTIONS:
        trained, sent = [], []
        for once in (True, False):
            model = Tied()
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.05),
                list(model.named_parameters(remove_duplicate=once)),
                **options,
            )
            steps(me, model, optimizer, 0)
            optimizer.gossip.drain()
            trained.append(vector(model))
            sent.append(optimizer.gossip.bytes_sent)
            names = [field.name for field in optimizer.gossip.layout.fields]
            assert names.count("one.weight") == 1
            assert "other.weight" not in names
        assert torch.equal(*trained), options
        assert sent[0] == sent[1]


def searched(model: torch.nn.Module, **options: Any) -> Any:
    return wrapped(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), **options)


def searches(me: Rank, **options: Any) -> None:
    model = mlp()
    optimizer = searched(model, **options)
    x, y = batch(0, 0, torch.float64, 5, 3)  # the same everywhere: Horovod wants equal counts

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[0]
    assert_nodes_equal(me, model)


@on_ranks([*BOTH_SCOPES, Job(2), *ONE_NODE, Job(1)])
def test_lbfgs_is_refused_where_its_evaluations_would_gossip(me: Rank) -> None:
    fine: list[dict[str, Any]] = [{"method": "none"}]
    if me.job.scope == "world":
        fine.append({"method": "allreduce"})
    if len(me.nodes) == 1:
        fine += [{}, {"method": "allreduce"}]
    for options in fine:
        searches(me, **options)
    if len(me.nodes) > 1:
        for options in ({}, {"timing": "awc"}, {"method": "local_sgd"}):
            with pytest.raises(hvd.ConfigError, match="LBFGS, which evaluates its closure several"):
                searched(mlp(), **options)
        if me.job.scope == "node":
            with pytest.raises(hvd.ConfigError, match="'allreduce' with LBFGS"):
                searched(mlp(), method="allreduce")
