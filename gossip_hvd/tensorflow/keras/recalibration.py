"""``recalibrate_batch_norm``: batch norm's statistics, measured anew for merged weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from gossip_hvd.errors import ConfigError
from gossip_hvd.tensorflow.keras.values import allreduce


def recalibrate_batch_norm(model: Any, data: Iterable[Any]) -> None:
    """Measure moving means and variances over the batches of all ranks; all ranks must call.

    What ``gossip_hvd.torch.recalibrate_batch_norm`` does, and says why: the statistics become the
    mean over all batches, the same bits everywhere.

    Args:
        model: with equal weights on every rank.
        data: this rank's batches: inputs, or tuples that begin with them.

    Raises:
        ConfigError: on every rank, where no rank has a batch.
    """
    kind = keras.layers.BatchNormalization
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, kind)]
    if not layers:
        return
    momenta, count = [layer.momentum for layer in layers], 0
    try:
        for batch in data:
            for layer in layers:  # the mean of all batches so far
                layer.momentum = count / (count + 1)
            model(batch[0] if isinstance(batch, tuple | list) else batch, training=True)
            count += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    statistics = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
    own = [np.asarray(keras.ops.convert_to_numpy(v), np.float64) for v in statistics]
    mine = np.concatenate([[1.0], *own]) * count
    added = allreduce(mine, name="gossip_hvd.recalibrate", average=False)
    total = keras.ops.convert_to_numpy(added)
    if not total[0]:
        raise ConfigError("recalibrate_batch_norm: no rank's data has a batch.")
    ends = np.cumsum([v.size for v in own])[:-1]
    for variable, value in zip(statistics, np.split(total[1:] / total[0], ends), strict=True):
        variable.assign(value.astype(variable.dtype))
