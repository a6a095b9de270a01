"""The TensorFlow adapter: ``import gossip_hvd.tensorflow as hvd`` in place of Horovod's.

Its names are looked up when they are first used, so that ``gossip_hvd.keras`` can run on PyTorch
where TensorFlow is not installed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossip_hvd.tensorflow.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    special = name.startswith("__") and name != "__all__"
    if special or find_spec(f"{__name__}.{name}"):  # a module that has not been imported yet
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.api"), name)
