"""``RingShuffledDataset``: in-memory samples that go round all ranks, as a PyTorch data set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info

from gossip_hvd.errors import ConfigError
from gossip_hvd.shards import ring_of


class RingShuffledDataset(IterableDataset[tuple[torch.Tensor, ...]]):
    """Batches of this rank's samples; samples that were used move to the next rank.

    Each iteration is an epoch. ``DataLoader(dataset, batch_size=None)`` adds what loaders have,
    such as pinned memory; the data set may be iterated as it is, too. To resume at epoch e with
    shards from files, give rank r shard (r + e) mod size and set ``epoch = e − 1``; samples of a
    shard are then in another order.

    Args:
        tensors: this rank's samples, in memory, such as images and labels: equally many on all
            ranks. Copied.
        batch_size: samples in a batch; the last may be smaller.
        seed: of the order of samples.

    Raises:
        ConfigError: on every rank, where shards differ in size or dtype.
    """

    def __init__(self, *tensors: torch.Tensor, batch_size: int, seed: int = 0) -> None:
        self._tensors = [t.detach().to("cpu", copy=True).contiguous() for t in tensors]
        shard = [t.reshape(len(t), -1).view(torch.uint8).numpy() for t in self._tensors]
        kinds = [f"{tuple(t.shape)} {t.dtype}" for t in tensors]
        self._ring = ring_of(shard, kinds, batch_size, seed)

    @property
    def epoch(self) -> int:
        """The epoch under way or last ended; −1 before the first."""
        return self._ring.epoch

    @epoch.setter
    def epoch(self, number: int) -> None:
        self._ring.epoch = number

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._ring)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """One epoch; at its end all of its samples have moved on."""
        if get_worker_info() is not None:
            raise ConfigError(
                "RingShuffledDataset: samples move within this process's memory, which workers "
                "do not see: use num_workers=0."
            )
        ring = self._ring
        ring.begin()
        for place in range(len(ring)):
            yield ring.take(place, lambda rows: tuple(t[rows] for t in self._tensors))
        ring.finish()
