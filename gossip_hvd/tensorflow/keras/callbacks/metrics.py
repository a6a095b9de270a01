"""``MetricAverageCallback``: every rank sees the mean of all ranks' metrics."""

from __future__ import annotations

from typing import Any

from gossip_hvd import session
from gossip_hvd.agreement import require_agreement
from gossip_hvd.tensorflow.keras.callbacks.contract import Callback


class MetricAverageCallback(Callback):
    """Average the logs of an epoch over all ranks, with the same bits everywhere.

    Put it before callbacks that decide by them, such as ``EarlyStopping``, ``ReduceLROnPlateau``
    and ``TensorBoard``: then all ranks decide alike.

    Args:
        device: Horovod's argument; numbers are averaged on the host.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace every number by its mean over ranks."""
        if not logs:
            return
        names = sorted(name for name, value in logs.items() if _is_number(value))
        world = session.current().world
        require_agreement(world, "MetricAverageCallback", {"the names of metrics": names})
        total = world.sum([float(logs[name]) for name in names], "MetricAverageCallback")
        logs.update(zip(names, (float(value) / world.size for value in total), strict=True))


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
