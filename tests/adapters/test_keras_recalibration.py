"""Batch norm's statistics under Keras, measured anew on real ranks."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras_models import BOTH, on
from rank import Rank
from ranks import Job, on_ranks

from gossip_hvd.errors import ConfigError
from gossip_hvd.keras import recalibrate_batch_norm


def network():
    keras.utils.set_random_seed(4)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.BatchNormalization(),
            layers.Dense(3),
            layers.BatchNormalization(),
        ]
    )


def batches(rank: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(rank)
    return [(rank + random.normal(size=(6, 5))).astype(np.float32) for _ in range(count)]


@on_ranks(on(BOTH, [Job(1), Job(4), Job(5, "node", 2)]))
def test_batch_norm_is_measured_over_the_batches_of_all_ranks(me: Rank) -> None:
    model = network()
    counts = [(rank + 1) % 4 for rank in range(me.size)]  # with 4 ranks, one has no data
    weights = [np.array(keras.ops.convert_to_numpy(w)) for w in model.trainable_weights]
    model.layers[0].moving_mean.assign(np.full(5, 7.0 + me.rank))
    recalibrate_batch_norm(model, [(x, 0) for x in batches(me.rank, counts[me.rank])])
    assert model.layers[0].momentum == 0.99

    every = [x for rank in range(me.size) for x in batches(rank, counts[rank])]
    kernel, bias = (keras.ops.convert_to_numpy(w) for w in model.layers[1].weights)
    inside = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) @ kernel + bias for x in every]
    for layer, seen in ((model.layers[0], every), (model.layers[2], inside)):
        mean = keras.ops.convert_to_numpy(layer.moving_mean)
        variance = keras.ops.convert_to_numpy(layer.moving_variance)
        np.testing.assert_allclose(mean, np.mean([x.mean(0) for x in seen], axis=0), atol=1e-5)
        np.testing.assert_allclose(variance, np.mean([x.var(0) for x in seen], axis=0), atol=1e-5)
    everyone = me.gather([np.asarray(w).tolist() for w in model.get_weights()])
    assert all(other == everyone[0] for other in everyone)
    for old, new in zip(weights, model.trainable_weights, strict=True):
        assert np.array_equal(old, keras.ops.convert_to_numpy(new))
    with pytest.raises(ConfigError, match="no rank's data"):
        recalibrate_batch_norm(model, [])
