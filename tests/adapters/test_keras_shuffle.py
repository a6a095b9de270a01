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
    """Notes the samples of every batch that training is given."""

    def __getitem__(self, place: int):
        x, y = super().__getitem__(place)
        assert (x == y).all(), "a sample was torn"
        if self._training:
            seen.extend(y[:, 0].astype(int).tolist())
        return x, y


seen: list[int] = []


@on_ranks(on(BOTH, [Job(1), Job(4), Job(5, "node", 2)]))
def test_fit_sees_every_sample_after_p_epochs(me: Rank) -> None:
    seen.clear()
    numbers = np.arange(SAMPLES, dtype=np.float32)[:, None] + SAMPLES * me.rank
    dataset = Seeing(numbers, numbers, batch_size=BATCH)
    model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(1e-4)), "mse")
    for epoch in range(me.size):
        before = len(seen)
        model.fit(dataset, epochs=1, verbose=0)
        first = (me.rank + epoch) % me.size * SAMPLES
        assert sorted(seen[before:]) == list(range(first, first + SAMPLES))
    model.fit(dataset, epochs=2, verbose=0)
    assert len(seen) == (me.size + 2) * SAMPLES
