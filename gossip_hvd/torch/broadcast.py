"""``broadcast`` in all its forms: one rank's tensor for everybody; arguments as Horovod's.

Gradients flow through ``broadcast`` as Horovod's do: the root gets the mean gradient, others zero.
"""

from __future__ import annotations

from typing import Any

import torch
from horovod.torch import Average

from gossip_hvd import session
from gossip_hvd.torch.allreduce import allreduce
from gossip_hvd.torch.handles import Pending, begin, synchronize
from gossip_hvd.torch.process_sets import ProcessSet, global_process_set


def broadcast_async(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Pending:
    """Begin a broadcast; ``synchronize`` returns a new tensor."""
    return begin("broadcast", [tensor], name, process_set, root=root_rank)


def broadcast_async_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Pending:
    """Begin a broadcast in place."""
    return begin("broadcast", [tensor], name, process_set, inplace=True, root=root_rank)


def broadcast_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Overwrite a tensor with the root's and return it."""
    how: dict[str, Any] = {"inplace": True, "root": root_rank, "awaited": True}
    result: torch.Tensor = synchronize(begin("broadcast", [tensor], name, process_set, **how))
    return result


def broadcast(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """The root's tensor, as a new one; gradients flow through it.

    Args:
        tensor: of one shape and dtype on all ranks.
        root_rank: rank of the world, also within a process set.
        name: matches ranks; by default the next number.
        process_set: the ranks that take part.

    Raises:
        HorovodInternalError: on every rank, where ranks named different roots, say.
    """
    return _Broadcast.apply(tensor, root_rank, name, process_set)  # type: ignore[no-any-return, no-untyped-call]


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None, process_set: Any
    ) -> Any:
        ctx.root_rank, ctx.process_set = root_rank, process_set
        how: dict[str, Any] = {"root": root_rank, "awaited": True}
        return synchronize(begin("broadcast", [tensor], name, process_set, **how))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        mean = allreduce(gradient, op=Average, process_set=ctx.process_set)
        if session.current().world.rank != ctx.root_rank:
            mean = torch.zeros_like(mean)
        return mean, None, None, None
