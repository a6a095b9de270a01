"""``GossipCallback``: what gossip does, in the logs; and when replicas become one model."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gossip_hvd import session
from gossip_hvd.errors import ConfigError
from gossip_hvd.tensorflow.functions import average_variables
from gossip_hvd.tensorflow.keras.callbacks.contract import Callback, gossip_of


class GossipCallback(Callback):
    """Log the gossip of an epoch, and merge the replicas.

    Adds to the logs of each epoch ``consensus_distance`` (Ξ, over nodes), ``gossip_rounds``,
    ``gossip_megabytes`` (that this rank has sent in the epoch), ``gossip_seconds`` (of the epoch,
    spent in rounds on the path of training) and, for methods that have one, ``gossip_period``.
    Keras's ``TensorBoard``, put behind it, writes them all.

    Args:
        merge: ``"end"``: replace all replicas by their mean when training ends; a number k: also
            before every k-th epoch's validation, so that ``val_*`` are the merged model's; None:
            never.
        restore: after such a validation, let every replica go on from where it was.
        distance: whether to measure the consensus distance, which costs one exact average.
    """

    def __init__(
        self,
        merge: Literal["end"] | int | None = "end",
        restore: bool = False,
        distance: bool = True,
    ) -> None:
        super().__init__()
        number = isinstance(merge, int) and not isinstance(merge, bool) and merge >= 1
        if merge not in ("end", None) and not number:
            raise ConfigError(f"merge={merge!r}: expected 'end', a number of epochs, or None.")
        self.merge, self.restore, self.distance = merge, restore, distance
        self._epoch: int | None = None
        self._kept: tuple[list[Any], Any] | None = None
        self._before = (0, 0, 0.0)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note where counters stand."""
        self._epoch = epoch
        self._before = self._counters()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Merge before an epoch's validation, if it is this epoch's turn."""
        due = isinstance(self.merge, int) and self._epoch is not None
        if due and (self._epoch + 1) % self.merge == 0:  # type: ignore[operator]
            self._measure()
            if self.restore:
                self.model.optimizer.gossip.drain()
                # With the method's numbers, such as push-sum's weight, which a mean levels.
                state = self.model.optimizer.gossip.engine.state
                self._kept = [np.array(v.numpy()) for v in self.model.weights], state
            average_variables(self.model.weights)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Let replicas go on from where they were."""
        if self._kept is not None:
            kept, self.model.optimizer.gossip.engine.state = self._kept
            for variable, values in zip(self.model.weights, kept, strict=True):
                variable.assign(values)
            self._kept = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log what the epoch's gossip did."""
        gossip = gossip_of(self.model)
        self._epoch = None
        if logs is None or gossip is None or not gossip.begun:
            return
        if self._distance is None:
            self._measure()
        rounds, sent, seconds = (
            now - then for now, then in zip(self._counters(), self._before, strict=True)
        )
        if self._distance is not None:
            logs["consensus_distance"] = self._distance
        logs["gossip_rounds"] = rounds
        logs["gossip_megabytes"] = sent / 1e6
        logs["gossip_seconds"] = seconds
        engine = gossip.engine
        period = getattr(engine.state, "period", getattr(gossip.method, "period", None))
        if period is not None:
            logs["gossip_period"] = float(period)
        self._distance = None

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Make one model of all replicas."""
        if self.merge is not None and session.current().world.size > 1:
            average_variables(self.model.weights)

    _distance: float | None = None

    def _measure(self) -> None:
        gossip = gossip_of(self.model)
        if self.distance and gossip is not None and gossip.begun:
            self._distance = gossip.consensus_distance()

    def _counters(self) -> tuple[int, int, float]:
        gossip = gossip_of(self.model)
        if gossip is None or not gossip.begun:
            return 0, 0, 0.0
        return gossip.round, gossip.bytes_sent, gossip.seconds
