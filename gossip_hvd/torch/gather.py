"""``allgather`` and ``alltoall``: rows of all ranks put together; arguments as Horovod's.

Tensors may differ between ranks in their first dimension, and in nothing else. Gradients flow as
Horovod's do: that of a gathered tensor is this rank's rows of the mean gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from horovod.torch import Average

from gossip_hvd.torch.allreduce import allreduce, grouped_allreduce
from gossip_hvd.torch.handles import Pending, begin, synchronize
from gossip_hvd.torch.process_sets import ProcessSet, global_process_set

Tensors = Sequence[torch.Tensor]


def allgather_async(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Pending:
    """Begin to gather; ``synchronize`` returns the rows of all ranks."""
    return begin("allgather", [tensor], name, process_set)


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """The rows of all ranks, by rank; gradients flow through it.

    Args:
        tensor: first dimensions may differ between ranks; not of zero dimensions.
        name: matches ranks; by default the next number.
        process_set: the ranks that take part.
    """
    return _Allgather.apply(name, process_set, False, tensor)  # type: ignore[no-any-return, no-untyped-call]


def grouped_allgather_async(
    tensors: Tensors, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Pending:
    """Begin to gather several tensors as one operation."""
    return begin("allgather", tensors, name, process_set, grouped=True)


def grouped_allgather(
    tensors: Tensors, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """The rows of all ranks of several tensors; gradients flow through it."""
    return _Allgather.apply(name, process_set, True, *tensors)  # type: ignore[no-untyped-call]


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str | None, process_set: Any, grouped: bool, *tensors: torch.Tensor
    ) -> Any:
        if any(tensor.dim() for tensor in tensors):
            ctx.rows = [tensor.shape[0] if tensor.dim() else 0 for tensor in tensors]
        ctx.process_set, ctx.grouped = process_set, grouped
        return synchronize(begin("allgather", tensors, name, process_set, grouped=grouped))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        members = ctx.process_set
        means = (
            grouped_allreduce(list(gradients), op=Average, process_set=members)
            if ctx.grouped
            else [allreduce(gradients[0], op=Average, process_set=members)]
        )
        mine = torch.tensor([ctx.rows], dtype=torch.int32)
        before = allgather(mine, process_set=members)[: members.rank()].sum(0).tolist()
        parts = [
            mean.narrow(0, start, rows)
            for mean, start, rows in zip(means, before, ctx.rows, strict=True)
        ]
        return (None, None, None, *parts)


def alltoall_async(
    tensor: torch.Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Pending:
    """Begin an exchange of rows; ``synchronize`` returns the rows and how many came from whom."""
    return begin("alltoall", [tensor], name, process_set, splits=splits)


def alltoall(
    tensor: torch.Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send some rows to each rank, and get theirs; gradients flow back the same way.

    Args:
        tensor: first dimensions may differ between ranks.
        splits: rows for each rank, in their order; by default equally many.
        name: matches ranks; by default the next number.
        process_set: the ranks that take part.

    Returns:
        The rows from all ranks; with ``splits`` also how many came from each.
    """
    return _Alltoall.apply(tensor, splits, name, process_set)  # type: ignore[no-untyped-call]


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, splits: Any, name: str | None, process_set: Any
    ) -> Any:
        output, received = synchronize(alltoall_async(tensor, splits, name, process_set))
        ctx.process_set, ctx.received = process_set, received
        if splits is None:
            return output
        ctx.mark_non_differentiable(received)
        return output, received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        back, _sent = alltoall(gradient, ctx.received, process_set=ctx.process_set)
        return back, None, None, None
