"""``BroadcastGlobalVariablesCallback``: every rank starts from one rank's weights."""

from __future__ import annotations

from typing import Any

from gossip_hvd.tensorflow.functions import broadcast_variables
from gossip_hvd.tensorflow.keras.callbacks.contract import Callback, built


class BroadcastGlobalVariablesCallback(Callback):
    """Give all ranks the model and the optimizer of one.

    It happens when training begins, where Horovod's own comes after the first step; for a model
    that only its first batch builds, after that.

    Args:
        root_rank: world rank that has the values to keep.
        device: Horovod's argument; variables stay where they are.
        local_variables: a variable or variables that are not broadcast.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.broadcast_done = False
        # Not by Iterable: a TensorFlow variable is one, of its rows.
        single = hasattr(local_variables, "assign")
        self._local = [local_variables] if single else list(local_variables or ())

    def register_local_var(self, var: Any) -> None:
        """Leave this variable out."""
        self._local.append(var)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Broadcast, if there is everything to broadcast."""
        if built(self.model):
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Broadcast what the first step has built."""
        self._broadcast()

    def _broadcast(self) -> None:
        if self.broadcast_done:
            return
        left_out = {id(v) for v in self._local} | {id(getattr(v, "value", v)) for v in self._local}
        everything = [*self.model.variables, *self.model.optimizer.variables]
        chosen = {
            id(v): v for v in everything if id(v) not in left_out and id(v.value) not in left_out
        }
        broadcast_variables(chosen.values(), self.root_rank)
        self.broadcast_done = True
