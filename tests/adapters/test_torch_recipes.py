"""What belongs to training by gossip beside the gossip: LARS, its schedule, batch norm's end."""

from __future__ import annotations

import copy

import pytest
import torch
from academic import assert_nodes_equal, batch, mlp, plain
from rank import Rank
from ranks import BOTH_SCOPES, UNEVEN, Job, on_ranks
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import gossip_hvd.torch as hvd
from gossip_hvd.schedules import warm_up_and_decay
from gossip_hvd.torch.large_batch import LARS, DecayingWithRate

# LARS ------------------------------------------------------------------------------------------


def test_lars_is_its_equation() -> None:
    torch.manual_seed(1)
    w, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    mine = [nn.Parameter(w.clone()), nn.Parameter(b.clone())]
    optimizer = LARS(mine, lr=9.0, momentum=0.9, weight_decay=0.01, trust=0.02, eps=1e-9)
    v, u = torch.zeros_like(w), torch.zeros_like(b)
    for _ in range(4):
        g, h = torch.randn_like(w), torch.randn_like(b)
        mine[0].grad, mine[1].grad = g.clone(), h.clone()
        optimizer.step()
        local = 0.02 * w.norm() / (g.norm() + 0.01 * w.norm() + 1e-9)
        v = 0.9 * v + local * 9.0 * (g + 0.01 * w)
        u = 0.9 * u + 9.0 * h
        w, b = w - v, b - u
        torch.testing.assert_close(mine[0].data, w, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine[1].data, b, rtol=1e-12, atol=1e-12)


def test_lars_lets_zeros_learn_and_refuses_nonsense() -> None:
    zeros = nn.Parameter(torch.zeros(2, 2))
    zeros.grad = torch.ones(2, 2)
    optimizer = LARS([zeros], lr=0.1)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(zeros.data, torch.full((2, 2), -0.1))
    with pytest.raises(ValueError, match=r"momentum=-1"):
        LARS([zeros], lr=0.1, momentum=-1)


def test_decay_follows_the_rate_and_a_checkpoint_goes_on() -> None:
    def made() -> tuple[torch.optim.Optimizer, DecayingWithRate]:
        optimizer = LARS([nn.Parameter(torch.ones(2, 2))], lr=8.0, weight_decay=0.5)
        return optimizer, DecayingWithRate(
            optimizer, lambda step: warm_up_and_decay(step, 1, epochs=9, warm_up=4, hold=1)
        )

    optimizer, schedule = made()
    seen = []
    for _ in range(9):
        (group,) = optimizer.param_groups
        seen.append((group["lr"], group["weight_decay"]))
        optimizer.step()
        schedule.step()
    factors = [warm_up_and_decay(step, 1, epochs=9, warm_up=4, hold=1) for step in range(9)]
    assert seen == [(8.0 * f, 0.5 * f) for f in factors]
    assert len(set(factors)) > 5

    optimizer, schedule = made()
    for _ in range(5):
        optimizer.step()
        schedule.step()
    again, resumed = made()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(schedule.state_dict())
    again.step()
    resumed.step()
    (group,) = again.param_groups
    assert (group["lr"], group["weight_decay"]) == (8.0 * factors[6], 0.5 * factors[6])


@on_ranks([Job(2), Job(4, "node", 2)])
def test_lars_gossips_and_methods_that_do_not_know_it_say_so(me: Rank) -> None:
    model = mlp(torch.float32)
    optimizer = hvd.DistributedOptimizer(
        LARS(model.parameters(), lr=1.0, trust=0.01), model.named_parameters()
    )
    before = copy.deepcopy(model)
    for step in range(3):
        plain(model, optimizer, *batch(me.rank, step, torch.float32, 5, 3))
        assert_nodes_equal(me, model)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert all(not torch.equal(new, old) for new, old in pairs)
    other = mlp(torch.float32)
    with pytest.raises(hvd.ConfigError, match="knows SGD, Adam, AdamW, not LARS"):
        hvd.DistributedOptimizer(LARS(other.parameters(), lr=1.0), method="gossipgrad")


# Batch norm ------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Two batch norms of different size, the second behind weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.BatchNorm1d(5)
        self.between = nn.Linear(5, 3)
        self.second = nn.BatchNorm1d(3, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.between(self.first(x))))


def batches(rank: int, count: int) -> list[tuple[Tensor, int]]:
    random = torch.Generator().manual_seed(rank)
    return [(rank + torch.randn(6, 5, generator=random), 0) for _ in range(count)]


@on_ranks([Job(1), Job(2), *BOTH_SCOPES, UNEVEN[0]])
def test_batch_norm_is_measured_as_in_one_process_that_sees_all(me: Rank) -> None:
    model = Normed()
    with torch.no_grad():
        model.first.running_mean.fill_(7.0 + me.rank)  # whatever was there does not count
    counts = [(rank + 1) % 4 for rank in range(me.size)]  # with 4 ranks, one has no data
    model.eval()
    hvd.recalibrate_batch_norm(model, batches(me.rank, counts[me.rank]))
    assert not model.training
    assert (model.first.momentum, model.second.momentum) == (0.1, 0.3)

    whole = Normed()
    update_bn([one for rank in range(me.size) for one in batches(rank, counts[rank])], whole)
    for mine, known in ((model.first, whole.first), (model.second, whole.second)):
        torch.testing.assert_close(mine.running_mean, known.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.running_var, known.running_var, rtol=1e-5, atol=1e-6)
        assert mine.num_batches_tracked == sum(counts) == known.num_batches_tracked
    everyone = me.gather([b.tolist() for b in model.buffers()])
    assert all(other == everyone[0] for other in everyone)
    for mine, known in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, known)


@on_ranks([Job(1), Job(2)])
def test_a_model_without_batch_norm_and_a_job_without_data(me: Rank) -> None:
    model = mlp()
    hvd.recalibrate_batch_norm(model, iter([]))  # asks nobody
    with pytest.raises(hvd.ConfigError, match="no rank's loader"):
        hvd.recalibrate_batch_norm(Normed(), [])
