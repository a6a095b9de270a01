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
