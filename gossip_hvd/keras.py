"""Another name of ``gossip_hvd.tensorflow.keras``, which runs on PyTorch too."""

from typing import Any

import gossip_hvd.tensorflow.keras as _adapter
from gossip_hvd.tensorflow.keras import *  # noqa: F403

__all__ = _adapter.__all__


def __getattr__(name: str) -> Any:
    return getattr(_adapter, name)
