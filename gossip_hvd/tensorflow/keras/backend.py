"""Which framework lies beneath Keras in this process."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import keras

from gossip_hvd.errors import ConfigError
from gossip_hvd.variables import Framework


@cache
def framework() -> Framework:
    """The framework of Keras's backend.

    Raises:
        ConfigError: for a backend in which gossip cannot run.
    """
    name = keras.backend.backend()
    # Only the one that is used is imported: the other need not be installed.
    if name == "tensorflow":
        made: Framework = import_module("gossip_hvd.tensorflow.framework").TensorFlow()
    elif name == "torch":
        made = import_module("gossip_hvd.torch.variables").Torch()
    else:
        raise ConfigError(
            f"KERAS_BACKEND={name!r}: gossip_hvd trains Keras models on TensorFlow and on PyTorch. "
            f"Horovod has no operations for {name}, and its compiled training step has no place "
            "where weights could be exchanged. Set KERAS_BACKEND to tensorflow or torch before "
            "Keras is imported."
        )
    return made
