"""``reducescatter``: each rank gets its rows of the reduction; arguments as Horovod's.

Of n rows and p ranks the first n mod p ranks get one row more than the others. Gradients flow
through it: they are gathered, and for a sum multiplied by p, as Horovod's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from horovod.torch import Average, Compression, Sum

from gossip_hvd.torch.gather import allgather, grouped_allgather
from gossip_hvd.torch.handles import Pending, begin, synchronize
from gossip_hvd.torch.process_sets import ProcessSet, global_process_set

Tensors = Sequence[torch.Tensor]


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Pending:
    """Begin a reduce-scatter; ``synchronize`` returns this rank's rows."""
    return _begin([tensor], name, (op, process_set, prescale_factor, postscale_factor), False)


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """This rank's rows of the reduction over all ranks; gradients flow through it.

    Args:
        tensor: of one shape and dtype on all ranks; not of zero dimensions.
        name: matches ranks; by default the next number.
        compression: how it travels.
        op: ``Average``, ``Sum``, ``Min``, ``Max`` or ``Product``.
        process_set: the ranks that take part.
        prescale_factor: factor before the reduction.
        postscale_factor: factor after it.
    """
    compressed, context = compression.compress(tensor)
    how = (op, process_set, prescale_factor, postscale_factor)
    reduced = _Reducescatter.apply(name, how, False, compressed)  # type: ignore[no-untyped-call]
    return compression.decompress(reduced, context)  # type: ignore[no-any-return]


def grouped_reducescatter_async(
    tensors: Tensors,
    name: str | None = None,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Pending:
    """Begin the reduce-scatter of several tensors as one operation."""
    return _begin(tensors, name, (op, process_set, prescale_factor, postscale_factor), True)


def grouped_reducescatter(
    tensors: Tensors,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """This rank's rows of the reductions of several tensors; gradients flow through it."""
    compressed, contexts = zip(*[compression.compress(t) for t in tensors], strict=True)
    how = (op, process_set, prescale_factor, postscale_factor)
    reduced = _Reducescatter.apply(name, how, True, *compressed)  # type: ignore[no-untyped-call]
    return [compression.decompress(t, c) for t, c in zip(reduced, contexts, strict=True)]


def _begin(tensors: Tensors, name: str | None, how: tuple[Any, ...], grouped: bool) -> Pending:
    op, process_set, prescale, postscale = how
    factors = {"prescale": prescale, "postscale": postscale}
    return begin("reducescatter", tensors, name, process_set, grouped=grouped, op=op, **factors)


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str | None, how: Any, grouped: bool, *tensors: Any) -> Any:
        ctx.how, ctx.grouped = how, grouped
        return synchronize(_begin(tensors, name, how, grouped))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        op, process_set, prescale, postscale = ctx.how
        factor = prescale * postscale * (process_set.size() if op == Sum else 1)
        scaled = [gradient * factor for gradient in gradients]
        if ctx.grouped:
            return (None, None, None, *grouped_allgather(scaled, process_set=process_set))
        return None, None, None, allgather(scaled[0], process_set=process_set)
