"""Ranks of a node that are out of data while others clip, scale, skip and schedule."""

from __future__ import annotations

from typing import Any

import torch
from academic import assert_nodes_equal, batch, mlp, vector
from rank import Rank
from ranks import ONE_NODE, Job, on_ranks

import gossip_hvd.torch as hvd

LENGTHS = ([3, 6, 4, 5, 1], [6, 3, 3, 5, 4], [0, 2, 5, 1, 5])
"""Steps by rank."""
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"timing": "awc"},
    {"method": "sgp"},
    {"method": "slowmo", "period": 2},  # needs the rate
    {"method": "averaged_momentum"},  # sends the optimizer's state
    {"method": "gossip_aga", "warm_up": 2, "initial": 1},  # needs the loss
)
UNEVEN_NODES = [Job(5, "node", 3), Job(4, "node", 2), Job(4, "world", 2), ONE_NODE[0]]


def trained(me: Rank, lengths: list[int], infinite: bool, **options: Any) -> Any:
    """Clipped, scaled and scheduled training, with steps that a node skips."""
    model = mlp(torch.float32)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for step in range(lengths[me.rank]):
        # What clears gradients decides when the round of a skipped step is run.
        (model if step % 2 else optimizer).zero_grad()
        x, y = batch(me.rank, step, torch.float32, 5, 3)
        loss = (model(x) - y).square().mean()
        if infinite and step in (1, 2, 4) and me.rank in (1, 2):
            loss = loss * float("inf")
        optimizer.gossip.report_loss(loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    hvd.join()
    return model, optimizer


@on_ranks(UNEVEN_NODES)
def test_ranks_without_data_take_the_steps_of_their_node(me: Rank) -> None:
    for number, options in enumerate(OPTIONS):
        lengths = LENGTHS[number % len(LENGTHS)]
        model, optimizer = trained(me, lengths, number % 2 == 0, **options)
        assert_nodes_equal(me, model)
        states = [s["momentum_buffer"] for s in optimizer.state.values()]
        states.append(torch.tensor(optimizer.param_groups[0]["lr"]))
        every = me.gather([state.clone() for state in states])
        for ranks in me.nodes:
            for rank in ranks:
                for mine, theirs in zip(every[rank], every[ranks[0]], strict=True):
                    assert torch.equal(mine, theirs), (options, rank)
        if len(me.nodes) > 1:
            assert set(me.gather(optimizer.gossip.round)) == {max(lengths[: me.size])}


@on_ranks([Job(2, "node", 2), Job(4, "node", 2)])
def test_who_has_no_data_changes_nothing_but_the_mean(me: Rank) -> None:
    """One rank a node trains alone; its gradients count half, and clipping makes that no matter."""
    lengths = [4, 0, 4, 0]
    model, _ = trained(me, lengths, infinite=False, method="crossover")
    replicas = [mlp(torch.float32) for _ in me.nodes]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in replicas]
    for step in range(4):
        for node, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            x, y = batch(2 * node, step, torch.float32, 5, 3)
            optimizer.zero_grad()
            (replica(x) - y).square().mean().div(2).backward()
            torch.nn.utils.clip_grad_norm_(replica.parameters(), 0.05)
            optimizer.param_groups[0]["lr"] = 0.1 * 0.8**step
            optimizer.step()
        with torch.no_grad():
            for every in zip(*(replica.parameters() for replica in replicas), strict=True):
                mean = torch.stack(list(every)).mean(0)
                for p in every:
                    p.copy_(mean)
    torch.testing.assert_close(vector(model), vector(replicas[0]), rtol=1e-5, atol=1e-6)


@on_ranks([Job(4, "node", 2), Job(4, "world", 2)])
def test_the_loss_is_the_mean_over_ranks_that_have_one(me: Rank) -> None:
    """Rank 1 reports none, rank 2 is soon out of data, and of the other losses some are known."""
    model = mlp(torch.float32)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    names = model.named_parameters()
    optimizer = hvd.DistributedOptimizer(optimizer, names, method="gossip_aga", initial=1)
    heard = []
    for step in range(1 if me.rank == 2 else 3):
        optimizer.zero_grad()
        if me.rank != 1:
            optimizer.gossip.report_loss(1.0 + me.rank + 10 * step)
        x, y = batch(me.rank, step, torch.float32, 5, 3)
        (model(x) - y).square().mean().backward()
        heard.append(optimizer.gossip.engine.loss)
        optimizer.step()
    hvd.join()
    second = [3.5, 14.0, 24.0]
    assert heard == ([1.0, 11.0, 21.0] if me.node == 0 else second[: len(heard)])
    assert optimizer.gossip.engine.loss == (21.0 if me.node == 0 else 24.0)


@on_ranks([Job(4, "node", 2), Job(2, "node", 1)])
def test_a_node_that_never_has_data_follows_an_adaptive_method(me: Rank) -> None:
    options = {"method": "gossip_aga", "initial": 2, "warm_up": 3}
    lengths = [5, 4, 0, 0] if me.size == 4 else [5, 0]
    model, optimizer = trained(me, lengths, infinite=False, **options)
    assert_nodes_equal(me, model)
    states = me.gather(optimizer.gossip.engine.state)
    assert all(state == states[0] for state in states)
    assert states[0].initial_loss > 0
    assert optimizer.gossip.round == 5
