"""The ring shuffle under ``fit`` on real ranks."""

from __future__ import annotations

import keras
import numpy as np
from keras_models import BOTH, on
from rank import Rank
from ranks import Job, on_ranks

import gossip_hvd.keras as hvd
from gossip_hvd.tensorflow.keras.shuffle import RingShuffledDataset

SAMPLES, BATCH = 10, 4


class Seeing(RingShuffledDataset):
    """Notes the samples of every batch that training is given, by epoch."""

    def __getitem__(self, place: int):
        x, y = super().__getitem__(place)
        assert (x == y).all(), "a sample was torn"
        if self._training:
            seen.setdefault(self._ring.epoch, []).extend(y[:, 0].astype(int).tolist())
        return x, y


seen: dict[int, list[int]] = {}


@on_ranks(on(BOTH, [Job(1), Job(4), Job(5, "node", 2)]))
def test_fit_sees_every_sample_in_p_epochs(me: Rank) -> None:
    seen.clear()
    numbers = np.arange(SAMPLES, dtype=np.float32)[:, None] + SAMPLES * me.rank
    dataset = Seeing(numbers, numbers, batch_size=BATCH)
    model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(1e-4)), "mse")
    for _ in range(me.size):
        model.fit(dataset, epochs=1, verbose=0)
    model.fit(dataset, epochs=2, verbose=0)
    # Where Keras has looked at a batch to build the model, that was an epoch too.
    first = max(seen) - (me.size + 1)
    assert first in (0, 1)
    for epoch in range(first, first + me.size + 2):
        everyone = [number for one in me.gather(seen[epoch]) for number in one]
        assert sorted(everyone) == list(range(SAMPLES * me.size))
    mine = [number for epoch in range(first, first + me.size) for number in seen[epoch]]
    assert sorted(mine) == list(range(SAMPLES * me.size))
