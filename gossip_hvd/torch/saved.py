"""A gossip's saved state with tensors for arrays, as ``torch.save`` likes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def arrays_as(convert: Callable[[Any], Any], value: Any) -> Any:
    """Nested state with every array or tensor converted."""
    if isinstance(value, Mapping):
        return {key: arrays_as(convert, inner) for key, inner in value.items()}
    return convert(value) if isinstance(value, torch.Tensor | np.ndarray) else value


def bytes_of(tensor: Any) -> Any:
    """A flat tensor of bytes as an array; anything else as it is, to be refused by name."""
    plain = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.uint8
    return tensor.detach().to("cpu", copy=True).numpy() if plain else tensor
