"""Sparse gradients of a node: the rows of all its ranks, those of one index added up."""

from __future__ import annotations

from typing import Any

import horovod.torch as horovod
import torch

FOR_HOROVOD = {torch.bfloat16: torch.float32}


def begin(gradient: torch.Tensor, name: str, process_set: Any) -> tuple[int, int]:
    """Begin to gather the rows of every rank; returns Horovod's handles of indices and values.

    Args:
        gradient: sparse, in coordinates.
        name: matches ranks.
        process_set: the node's.
    """
    gradient = gradient.coalesce()
    values = gradient.values()
    values = values.to(FOR_HOROVOD.get(values.dtype, values.dtype))
    indices = gradient.indices().t().contiguous()
    return (
        horovod.allgather_async(indices, name=f"{name}.indices", process_set=process_set),
        horovod.allgather_async(values, name=f"{name}.values", process_set=process_set),
    )


def added(
    indices: torch.Tensor, values: torch.Tensor, divisor: int, parameter: torch.Tensor
) -> torch.Tensor:
    """The sum of what was gathered, divided, as a gradient of the parameter."""
    values = (values / divisor).to(parameter.dtype)
    rows = torch.sparse_coo_tensor(indices.t(), values, parameter.shape, check_invariants=False)
    return rows.coalesce()


def nothing(parameter: torch.Tensor, dims: int) -> torch.Tensor:
    """A gradient of zero: no rows.

    Args:
        parameter: whose gradient.
        dims: how many of its dimensions are sparse.
    """
    indices = torch.empty(dims, 0, dtype=torch.long, device=parameter.device)
    values = torch.empty(0, *parameter.shape[dims:], dtype=parameter.dtype, device=parameter.device)
    return torch.sparse_coo_tensor(
        indices, values, parameter.shape, check_invariants=False, is_coalesced=True
    )
