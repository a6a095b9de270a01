"""The ring shuffle on real ranks, beside gossip: who sees which sample when."""

from __future__ import annotations

import pytest
import torch
from academic import assert_nodes_equal, sgd
from rank import Rank
from ranks import ALONE, BOTH_SCOPES, Job, on_ranks
from torch.utils.data import DataLoader

import gossip_hvd.torch as hvd
from gossip_hvd.torch.shuffle import RingShuffledDataset

SAMPLES, BATCH = 10, 4


def shard(rank: int, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures whose every pixel is the sample's number, and that number again."""
    numbers = torch.arange(SAMPLES) + SAMPLES * rank
    return numbers.to(torch.float32)[:, None].repeat(1, width), numbers


@on_ranks([*ALONE, Job(2), Job(5), *BOTH_SCOPES])
def test_after_p_epochs_every_rank_has_seen_every_sample(me: Rank) -> None:
    # 200,000 pixels are more than MPI sends at once, so transfers are under way for long.
    for width in (3, 200_000 // me.size):
        dataset = RingShuffledDataset(*shard(me.rank, width), batch_size=BATCH)
        assert (len(dataset), dataset.epoch) == (3, -1)
        seen: list[int] = []
        for epoch in range(me.size):
            mine = []
            for x, y in DataLoader(dataset, batch_size=None):
                assert x.shape == (len(y), width)
                assert (x == y[:, None]).all(), "a sample was torn"
                mine += y.tolist()
            assert dataset.epoch == epoch
            assert len(dataset._ring.held) == SAMPLES, "the epoch ended before its samples had come"
            first = (me.rank + epoch) % me.size * SAMPLES
            assert sorted(mine) == list(range(first, first + SAMPLES))
            everyone = [number for one in me.gather(mine) for number in one]
            assert sorted(everyone) == list(range(SAMPLES * me.size))
            seen += mine
        assert sorted(seen) == list(range(SAMPLES * me.size))


@on_ranks([Job(4), *BOTH_SCOPES])
def test_samples_and_gossip_never_meet(me: Rank) -> None:
    """Both are under way at once; training is what it is with the same batches from a list."""

    def trained(batches: object, **options: object) -> torch.Tensor:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.Linear(300, 1))
        optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **options)
        for x, y in batches:  # type: ignore[attr-defined]
            optimizer.zero_grad()
            (model(x / 400)[:, 0] - y / 40).square().mean().backward()
            optimizer.step()
        optimizer.gossip.drain()
        assert_nodes_equal(me, model)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    for timing in ("atc", "awc"):
        dataset = RingShuffledDataset(*shard(me.rank, 64), batch_size=BATCH)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def epochs(dataset=dataset, kept=kept):
            for _ in range(3):
                for one in dataset:
                    kept.append(one)
                    yield one

        moving = trained(epochs(), timing=timing)
        assert torch.equal(moving, trained(kept, timing=timing))


@on_ranks([Job(2), Job(5)])
def test_an_epoch_may_be_left_early_and_by_some_only(me: Rank) -> None:
    dataset = RingShuffledDataset(*shard(me.rank), batch_size=BATCH, seed=2)
    for place, _ in enumerate(dataset):
        if place == me.rank % 2:
            break
    numbers = torch.cat([y for _, y in dataset])
    first = (me.rank + 1) % me.size * SAMPLES
    assert sorted(numbers.tolist()) == list(range(first, first + SAMPLES))
    for _ in dataset:
        break  # shutdown moves the rest


@on_ranks([Job(2)])
def test_shards_that_do_not_fit_and_workers_are_refused(me: Rank) -> None:
    with pytest.raises(hvd.ConfigError, match="array 0"):
        RingShuffledDataset(torch.zeros(3 + me.rank, 2), batch_size=2)
    with pytest.raises(hvd.ConfigError, match="batches of 0"):
        RingShuffledDataset(torch.zeros(3, 2), batch_size=0)
    dataset = RingShuffledDataset(torch.zeros(3, 2), batch_size=2)
    with pytest.raises(hvd.ConfigError, match="num_workers=0"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))
