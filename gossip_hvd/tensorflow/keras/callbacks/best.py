"""``BestModelCheckpoint``: the best model so far, by a metric that all ranks see."""

from __future__ import annotations

from typing import Any

import keras

from gossip_hvd import session
from gossip_hvd.errors import ConfigError
from gossip_hvd.tensorflow.keras.callbacks.contract import keep_outside_xla


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """Rank 0 saves the model whenever the metric is better than ever before.

    Put ``MetricAverageCallback`` before it. What is saved is rank 0's replica; with
    ``GossipCallback(merge=1)`` it has been validated as the merged model.

    Args:
        monitor: the metric.
        verbose: above 0, say when a model is saved.
        save_weights_only: a ``.weights.h5`` file in place of a whole model.
        mode: ``"min"``, ``"max"`` or ``"auto"``.
        save_freq: ``"epoch"``, or a number of batches.
        filepath: where to; may be set later, as Horovod's estimators do.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        filepath: Any = None,
    ) -> None:
        # Keras 3 looks at the ending at once.
        unnamed = "unnamed.weights.h5" if save_weights_only else "unnamed.keras"
        super().__init__(
            filepath=unnamed if filepath is None else filepath,
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        self.filepath = filepath

    def set_model(self, model: Any) -> None:
        """Keras's ``set_model``, which comes before the training step is traced."""
        super().set_model(model)
        keep_outside_xla(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refuse to begin without a place to save to."""
        if self.filepath is None:
            raise ConfigError("BestModelCheckpoint: set its filepath before training begins.")
        self.filepath = str(self.filepath)
        super().on_train_begin(logs)

    def _save_model(self, epoch: int, batch: int | None, logs: dict[str, Any]) -> None:
        if session.current().world.rank == 0:
            super()._save_model(epoch, batch, logs)
