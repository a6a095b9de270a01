"""``RingShuffledDataset``: in-memory samples that go round all ranks, for ``fit``."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from gossip_hvd.mixing import Array
from gossip_hvd.shards import ring_of


class RingShuffledDataset(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of this rank's samples; samples that were used move to the next rank.

    ``model.fit(RingShuffledDataset(images, labels, batch_size=32))``; see ``gossip_hvd.shuffle``.
    Every pass that Keras begins is an epoch. Under PyTorch the first ``fit`` looks at one batch to
    build the model, which is an epoch too: the shard then begins one rank further on.

    Args:
        arrays: this rank's samples, such as images and labels: equally many on all ranks. Copied.
        batch_size: samples in a batch; the last may be smaller.
        seed: of the order of samples.

    Raises:
        ConfigError: on every rank, where shards differ in size or dtype.
    """

    def __init__(self, *arrays: Any, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        self._arrays = [np.array(a, order="C") for a in arrays]
        shard = [a.reshape(len(a), -1).view(np.uint8) for a in self._arrays]
        kinds = [f"{a.shape} {a.dtype}" for a in self._arrays]
        self._ring = ring_of(shard, kinds, batch_size, seed)
        self._training = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._ring)

    def __getitem__(self, place: int) -> tuple[Array, ...]:
        """One batch; outside an epoch, where Keras looks at shapes, nothing moves."""
        if self._training:
            return self._ring.take(place, self._read)
        return self._read(slice(0, self._ring.batch))

    def on_epoch_begin(self) -> None:
        """Called by Keras."""
        self._ring.begin()
        self._training = True

    def on_epoch_end(self) -> None:
        """Called by Keras; returns when all samples have moved on."""
        self._training = False
        self._ring.finish()

    def _read(self, rows: Any) -> tuple[Array, ...]:
        return tuple(np.array(a[rows]) for a in self._arrays)
