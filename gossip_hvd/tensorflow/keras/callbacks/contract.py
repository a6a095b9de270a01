"""What all callbacks share: they see to it that the training step stays outside XLA."""

from __future__ import annotations

import logging
from typing import Any

import keras

log = logging.getLogger("gossip_hvd")


class Callback(keras.callbacks.Callback):  # type: ignore[misc]
    """A callback that is called in the training's own thread, in order."""

    def set_model(self, model: Any) -> None:
        """Keras's ``set_model``, which comes before the training step is traced."""
        super().set_model(model)
        keep_outside_xla(model)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Nothing to do; that it is here keeps Keras from calling batches' ends out of order."""


def keep_outside_xla(model: Any) -> None:
    """Set ``jit_compile`` to False, and say so, where it is not yet."""
    if keras.backend.backend() == "tensorflow" and model.jit_compile:
        log.warning(
            "gossip_hvd: jit_compile is set to False: XLA cannot compile a training step "
            "that exchanges gradients and weights with other ranks."
        )
        model.jit_compile = False
        model.train_function = None


def gossip_of(model: Any) -> Any:
    """The gossip of a model's optimizer; None where it is not distributed."""
    return getattr(model.optimizer, "gossip", None)


def built(model: Any) -> bool:
    """Build the optimizer, as its first step would; False where the model has no variables yet."""
    optimizer = model.optimizer
    if not model.built:
        return False
    if not optimizer.built:
        with keras.name_scope(optimizer.name):
            optimizer.build(model.trainable_variables)
    return True
