"""``allreduce`` in all its forms: the reduction of a tensor over all ranks; arguments as Horovod's.

    y = postscale · ⊕ᵢ (prescale · xᵢ)        with ⊕ the mean, sum, minimum, maximum or product

Gradients flow through ``allreduce`` and ``grouped_allreduce``: the gradient is reduced likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from horovod.torch import Average, Compression
from horovod.torch.mpi_ops import handle_average_backwards_compatibility as reduction

from gossip_hvd.torch.handles import Pending, begin, synchronize
from gossip_hvd.torch.process_sets import ProcessSet, global_process_set

Tensors = Sequence[torch.Tensor]


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Pending:
    """Begin a reduction; ``synchronize`` returns a new tensor."""
    return _begin(
        [tensor], name, reduction(op, average), prescale_factor, postscale_factor, process_set
    )


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Pending:
    """Begin a reduction in place."""
    return _begin(
        [tensor],
        name,
        reduction(op, average),
        prescale_factor,
        postscale_factor,
        process_set,
        inplace=True,
    )


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Reduce a tensor in place and return it."""
    how = reduction(op, average), prescale_factor, postscale_factor, process_set
    begun = _begin([tensor], name, *how, inplace=True, awaited=True)
    result: torch.Tensor = synchronize(begun)
    return result


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """The reduction of a tensor, which is left as it is; gradients flow through it.

    Args:
        tensor: of one shape and dtype on all ranks.
        average: Horovod's old argument; use ``op``.
        name: matches ranks; by default the next number, so that calls match by their order.
        compression: how it travels, such as ``Compression.fp16``.
        op: ``Average`` (the default), ``Sum``, ``Min``, ``Max`` or ``Product``; in scope
            ``world`` also ``Adasum``.
        prescale_factor: factor before the reduction.
        postscale_factor: factor after it.
        process_set: the ranks that take part.

    Raises:
        HorovodInternalError: on every rank, where ranks asked for different things.
    """
    compressed, context = compression.compress(tensor)
    how = reduction(op, average), prescale_factor, postscale_factor, process_set
    reduced = _reduced(name, how, False, compressed)
    return compression.decompress(reduced, context)  # type: ignore[no-any-return]


def grouped_allreduce_async(
    tensors: Tensors,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Pending:
    """Begin the reduction of several tensors as one operation."""
    return _begin(
        tensors,
        name,
        reduction(op, average),
        prescale_factor,
        postscale_factor,
        process_set,
        grouped=True,
    )


def grouped_allreduce_async_(
    tensors: Tensors,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Pending:
    """Begin the reduction of several tensors in place as one operation."""
    return _begin(
        tensors,
        name,
        reduction(op, average),
        prescale_factor,
        postscale_factor,
        process_set,
        grouped=True,
        inplace=True,
    )


def grouped_allreduce_(
    tensors: Tensors,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> tuple[torch.Tensor, ...]:
    """Reduce several tensors in place as one operation."""
    how = reduction(op, average), prescale_factor, postscale_factor, process_set
    begun = _begin(tensors, name, *how, grouped=True, inplace=True, awaited=True)
    result: tuple[torch.Tensor, ...] = synchronize(begun)
    return result


def grouped_allreduce(
    tensors: Tensors,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """The reductions of several tensors as one operation; gradients flow through it."""
    compressed, contexts = zip(*[compression.compress(t) for t in tensors], strict=True)
    how = reduction(op, average), prescale_factor, postscale_factor, process_set
    reduced = _reduced(name, how, True, *compressed)
    return [compression.decompress(t, c) for t, c in zip(reduced, contexts, strict=True)]


def sparse_allreduce_async(
    tensor: torch.Tensor,
    name: str,
    op: Any,
    process_set: ProcessSet = global_process_set,
) -> Callable[[], torch.Tensor]:
    """Begin the sum or mean of a sparse tensor; returns a function that waits for the result.

    Indices and values of all ranks are gathered; the result is not coalesced, as Horovod's.
    """
    indices = begin(
        "allgather",
        [tensor._indices().transpose(0, 1).contiguous()],
        f"{name}.indices",
        process_set,
    )
    values = begin("allgather", [tensor._values()], f"{name}.values", process_set)

    def wait() -> torch.Tensor:
        every, where = synchronize(values), synchronize(indices)
        if op == Average:
            every = every / process_set.size()
        if where.dim() == 0 or every.dim() == 0:
            return torch.zeros_like(tensor)
        return torch.sparse_coo_tensor(where.transpose(0, 1), every, tensor.size())

    return wait


def _begin(
    tensors: Tensors,
    name: str | None,
    op: Any,
    prescale: float,
    postscale: float,
    process_set: Any,
    **how: bool,
) -> Pending:
    return begin(
        "allreduce",
        tensors,
        name,
        process_set,
        op=op,
        prescale=prescale,
        postscale=postscale,
        **how,
    )


def _reduced(name: str | None, how: Any, grouped: bool, *tensors: torch.Tensor) -> Any:
    """The reduction, through autograd where somebody may ask for a gradient."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Allreduce.apply(name, how, grouped, *tensors)  # type: ignore[no-untyped-call]
    return synchronize(_begin(tensors, name, *how, grouped=grouped, awaited=True))


class _Allreduce(torch.autograd.Function):
    """One tensor, or a group of them; the backward reduces the gradients likewise."""

    @staticmethod
    def forward(ctx: Any, name: str | None, how: Any, grouped: bool, *tensors: Any) -> Any:
        ctx.how, ctx.grouped = how, grouped
        return _reduced(name, how, grouped, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        reduced = _reduced(None, ctx.how, ctx.grouped, *gradients)
        return (None, None, None, *(reduced if ctx.grouped else (reduced,)))
