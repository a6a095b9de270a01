"""Learning rates for many ranks: a schedule by epochs, and the gradual warm-up of large batches.

Momentum correction, where the velocity v ← μ v − γ g carries the learning rate in it: when γ
becomes γ', v is multiplied by γ'/γ, once. Horovod multiplies μ for one step, which is the same;
in Keras 3 μ is part of the compiled step and cannot be changed from outside.

Reference: Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from gossip_hvd import session
from gossip_hvd.tensorflow.keras.callbacks.contract import Callback


class LearningRateScheduleCallback(Callback):
    """Set the learning rate to ``initial_lr * multiplier`` from one epoch to another.

    Args:
        initial_lr: the learning rate at multiplier 1.
        multiplier: a function of the epoch, or a constant c for c^(epoch − start_epoch).
        start_epoch: the first epoch in which it acts.
        end_epoch: the epoch in which it acts no more; None for never.
        staircase: act once an epoch; otherwise every batch, with fractions of epochs.
        momentum_correction: whether to correct the momentum of SGD and RMSprop.
        steps_per_epoch: needed without ``staircase`` where Keras does not know it.

    Raises:
        ValueError: without ``initial_lr``.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ValueError("Parameter `initial_lr` is required")
        self.initial_lr = initial_lr
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.staircase, self.momentum_correction = staircase, momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        self.multiplier = (
            multiplier
            if callable(multiplier)
            else lambda epoch: float(multiplier) ** (epoch - start_epoch)
        )

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find out how long an epoch is."""
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(
                    "Could not autodetect the number of steps per epoch. Please specify the "
                    f"steps_per_epoch parameter to the {type(self).__name__}()."
                )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note the epoch."""
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the learning rate, if it is time to."""
        over = self.end_epoch is not None and self.current_epoch >= self.end_epoch
        if self.current_epoch < self.start_epoch or over:
            return
        if not self.staircase:
            assert self.steps_per_epoch
            self._set(self.current_epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._set(self.current_epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the learning rate."""
        if logs is not None:
            logs["lr"] = self._rate()

    def _rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _set(self, epoch: float) -> None:
        old, new = self._rate(), self.initial_lr * self.multiplier(epoch)
        self.model.optimizer.learning_rate = new
        if self.momentum_correction and old and new != old:
            for velocity in _velocities(self.model.optimizer):
                velocity.assign(velocity * (new / old))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raise the learning rate from ``initial_lr / size()`` to ``initial_lr``, batch by batch.

    Args:
        initial_lr: the learning rate at the end, already scaled by the number of ranks.
        warmup_epochs: how long it takes.
        momentum_correction: whether to correct the momentum of SGD and RMSprop.
        steps_per_epoch: needed where Keras does not know it.
        verbose: above 0, rank 0 says when it is over.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            # So that an epoch ends at a round number.
            assert self.steps_per_epoch
            epoch += 1.0 / self.steps_per_epoch
            size = session.current().world.size
            return 1.0 / size * (epoch * (size - 1) / warmup_epochs + 1)

        super().__init__(
            initial_lr,
            multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the learning rate, and say when the warm-up is over."""
        super().on_epoch_end(epoch, logs)
        last = self.end_epoch is not None and epoch == self.end_epoch - 1
        if last and self.verbose > 0 and session.current().world.rank == 0:
            print(
                f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {self._rate():g}."
            )


def _velocities(optimizer: Any) -> list[Any]:
    """The buffers of an optimizer that carry the learning rate."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(inner, keras.optimizers.SGD):
        return [v for v in getattr(inner, "momentums", ()) if v is not None]
    if isinstance(inner, keras.optimizers.RMSprop):
        return [v for v in getattr(inner, "_momentums", ()) if v is not None]
    return []
