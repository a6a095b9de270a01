"""Tensors as the flat arrays that travel, and back: any layout, any device, bfloat16, complex."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from gossip_hvd.mixing import Array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KNOWN = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
}

FOR_HOROVOD = {torch.bfloat16: torch.float32, torch.bool: torch.uint8}
"""What travels in place of a dtype that Horovod does not know."""


SMALL_INTEGERS = {torch.uint8, torch.int8, torch.int16}


def staged(
    tensor: torch.Tensor, *, for_horovod: bool = False, reducing: bool = False
) -> torch.Tensor:
    """The tensor itself where it can travel as it is, else a copy that can.

    Args:
        tensor: any dense tensor.
        for_horovod: Horovod takes any device but no bfloat16, truth values or complex numbers;
            MPI takes the host's memory.
        reducing: Horovod reduces no integers of less than 32 bits.

    Raises:
        ValueError: for a dtype that cannot travel.
    """
    tensor = tensor.detach()
    if tensor.dtype not in KNOWN or tensor.layout != torch.strided:
        raise ValueError(f"Tensor type {tensor.type()} is not supported.")
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if for_horovod:
        tensor = tensor.to(FOR_HOROVOD.get(tensor.dtype, tensor.dtype))
        if reducing and tensor.dtype in SMALL_INTEGERS:
            tensor = tensor.int()
    else:
        tensor = tensor.cpu()
    return tensor.resolve_neg().contiguous()


def restored(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A result with the dtype and on the device of the tensor that was given."""
    if like.is_complex():
        result = torch.view_as_complex(result.contiguous())
    return result.to(device=like.device, dtype=like.dtype)


def array_of(tensor: torch.Tensor) -> Array:
    """A staged tensor's memory as a 1-D array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().reshape(-1).view(BFLOAT16)
    return tensor.numpy().reshape(-1)


def tensor_of(array: Array, shape: Any) -> torch.Tensor:
    """An array's memory as a tensor."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).reshape(shape)
    return torch.from_numpy(array).reshape(shape)
