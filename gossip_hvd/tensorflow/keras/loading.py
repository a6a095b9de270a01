"""``load_model``: a saved model, with its optimizer distributed again."""

from __future__ import annotations

from typing import Any

import keras

from gossip_hvd.tensorflow.keras.optimizer import DistributedOptimizer


def load_model(
    filepath: Any,
    custom_optimizers: Any = None,
    custom_objects: dict[str, Any] | None = None,
    compression: Any = None,
    legacy_opts: bool = False,
    **arguments: Any,
) -> Any:
    """Load a whole model and distribute its optimizer; all ranks must call.

    Files carry no trace of this library, so Keras alone loads them too. Broadcast after it where
    ranks may have read different files.

    Args:
        filepath: of a ``.keras`` or ``.h5`` file.
        custom_optimizers: classes of optimizers that Keras does not know.
        custom_objects: as Keras's.
        compression: of gradients, as for ``DistributedOptimizer``.
        legacy_opts: Horovod's argument; Keras 3 has no legacy optimizers.
        arguments: further ones of ``DistributedOptimizer``, such as ``method``.
    """
    known = {kind.__name__: kind for kind in custom_optimizers or ()}
    model = keras.saving.load_model(filepath, custom_objects={**known, **(custom_objects or {})})
    if model.optimizer is not None:
        model.optimizer = DistributedOptimizer(
            model.optimizer, compression=compression, **arguments
        )
        model.train_function = None
    return model
