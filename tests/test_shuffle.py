"""The ring shuffle on the memory wire: no sample is lost, doubled, or torn, at any time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gossip_hvd.errors import ConfigError
from gossip_hvd.shuffle import RingShuffle
from gossip_hvd.transport.memory import Switchboard


class Ring:
    """All ranks of a ring, whose samples are numbers and the same numbers' cubes as labels."""

    def __init__(self, ranks: int, samples: int, batch: int, seed: int = 0) -> None:
        self.board = Switchboard(ranks, seed=seed)
        self.numbers = [np.arange(samples) + samples * rank for rank in range(ranks)]
        self.cubes = [numbers**3 for numbers in self.numbers]
        self.all = list(range(ranks * samples))
        self.ranks = [
            RingShuffle(
                [x.reshape(samples, 1).view(np.uint8) for x in (numbers, cubes)],
                batch,
                self.board.wire(rank),
                ranks,
                seed,
            )
            for rank, (numbers, cubes) in enumerate(zip(self.numbers, self.cubes, strict=True))
        ]

    def held(self) -> list[int]:
        """Every sample that lies on some rank, as often as it does."""
        found: list[int] = []
        for numbers, cubes, ring in zip(self.numbers, self.cubes, self.ranks, strict=True):
            assert (cubes[ring.held] == numbers[ring.held] ** 3).all(), "a sample lost its label"
            found += numbers[ring.held].tolist()
        return found

    def begin(self) -> None:
        """What ``begin`` does on real ranks, in turns."""
        for ring in self.ranks:
            ring.release()
        while sum(ring.poll() for ring in self.ranks):
            self.check()
        for ring in self.ranks:
            ring.begin()

    def check(self) -> None:
        held = self.held()
        assert len(held) == len(set(held)), "a sample lies on two ranks"
        if not any(ring._under_way for ring in self.ranks):
            assert sorted(held) == self.all


@pytest.mark.parametrize(
    ("ranks", "samples", "batch"), [(1, 7, 3), (2, 8, 4), (3, 10, 4), (4, 5, 1), (5, 6, 10)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_sample_is_on_one_rank_and_everybody_sees_all(
    ranks: int, samples: int, batch: int, seed: int
) -> None:
    ring, order = Ring(ranks, samples, batch, seed), random.Random(seed)
    seen: list[list[int]] = [[] for _ in range(ranks)]
    for epoch in range(ranks):
        ring.begin()
        assert sorted(ring.held()) == ring.all
        todo = [rank for rank in range(ranks) for _ in range(len(ring.ranks[rank]))]
        order.shuffle(todo)  # ranks run ahead of each other by whole epochs' worth of batches
        places = [0] * ranks
        this: list[list[int]] = [[] for _ in range(ranks)]
        for rank in todo:
            batch_read = ring.ranks[rank].take(places[rank], ring.numbers[rank].__getitem__)
            places[rank] += 1
            this[rank] += batch_read.tolist()
            ring.ranks[order.randrange(ranks)].poll()
            ring.check()
        for rank, values in enumerate(this):
            assert len(values) == len(set(values)) == samples
            # Epoch e: the shard of rank r + e.
            first = (rank + epoch) % ranks * samples
            assert sorted(values) == list(range(first, first + samples))
            seen[rank] += values
    assert all(sorted(values) == ring.all for values in seen)
    ring.begin()
    assert ring.board.idle() or ranks == 1
    assert [int(n.min()) // samples for n in ring.numbers] == list(range(ranks))  # home again


def test_orders_differ_between_epochs_and_ranks() -> None:
    ring = Ring(2, 50, 50)
    orders = []
    for _ in range(2):
        ring.begin()
        orders += [tuple(one.take(0, lambda rows: rows.tolist())) for one in ring.ranks]
    assert len(set(orders)) == 4


def test_ranks_may_stop_at_different_batches() -> None:
    ring = Ring(3, 9, 2)
    ring.begin()
    for rank, one in enumerate(ring.ranks):
        for place in range(rank):
            one.take(place, len)
    ring.begin()
    assert sorted(ring.held()) == ring.all
    assert [int(n.min()) // 9 for n in ring.numbers] == [1, 2, 0]


def test_what_cannot_be_is_refused() -> None:
    wire = Switchboard(2).wire(0)
    with pytest.raises(ConfigError, match=r"\[2, 3\] samples"):
        RingShuffle([np.zeros((2, 1), np.uint8), np.zeros((3, 1), np.uint8)], 1, wire, 2)
    with pytest.raises(ConfigError, match=r"batches of 0"):
        RingShuffle([np.zeros((2, 1), np.uint8)], 0, wire, 2)
    with pytest.raises(ConfigError, match="larger batches"):
        RingShuffle([np.zeros((40_000, 1), np.uint8)], 1, wire, 2)
    ring = RingShuffle([np.zeros((2, 1), np.uint8)], 1, wire, 1)
    with pytest.raises(ConfigError, match=r"after begin\(\)"):
        ring.take(0, len)
    ring.begin()
    ring.take(1, len)
    assert not ring.unread(1)
    with pytest.raises(ConfigError, match="batch 1 of 2"):
        ring.take(1, len)


def test_the_end_of_an_epoch_tells_of_its_progress_and_of_samples_that_may_still_travel() -> None:
    ring = Ring(3, 8, 2)
    ring.begin()
    assert ring.ranks[0].facts().peers == (1, 2)
    assert ring.ranks[0].facts().travels
    before = [one.moved() for one in ring.ranks]
    ring.begin()
    assert [one.moved() - a for one, a in zip(ring.ranks, before, strict=True)] == [4, 4, 4]
