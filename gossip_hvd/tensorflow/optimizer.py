"""``DistributedOptimizer`` with the arguments of ``horovod.tensorflow``, in their order."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from gossip_hvd.errors import ConfigError
from gossip_hvd.tensorflow.keras import optimizer as adapter


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = horovod.Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: Any = horovod.Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
    **gossip: Any,
) -> Any:
    """As ``gossip_hvd.tensorflow.keras.DistributedOptimizer``, which explains the arguments.

    ``use_locking`` is accepted; Keras locks nothing.

    Raises:
        ConfigError: also for an optimizer of TensorFlow 1.
    """
    if isinstance(optimizer, tf.compat.v1.train.Optimizer):
        raise ConfigError(
            f"{type(optimizer).__name__} is an optimizer of TensorFlow 1: use one of "
            "keras.optimizers, or DistributedGradientTape."
        )
    return adapter.DistributedOptimizer(
        optimizer,
        name,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        backward_passes_per_step,
        average_aggregated_gradients,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
        **gossip,
    )
