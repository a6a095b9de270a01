"""``average_parameters``: many replicas become one, exactly and with the same bits everywhere."""

from __future__ import annotations

import torch

from gossip_hvd import session
from gossip_hvd.gossip import running
from gossip_hvd.torch.gossip import TorchGossip
from gossip_hvd.torch.tensors import array_of


def average_parameters(model: torch.nn.Module, *, buffers: bool = False) -> None:
    """Replace a model's weights by their exact mean, in place; all ranks must call.

    Every node counts once where a distributed optimizer trains the model, weights that it does
    not train included; otherwise every rank does.

    Args:
        model: any model.
        buffers: also average its floating-point buffers, such as batch-norm statistics.
    """
    mine = [gossip for gossip in running() if isinstance(gossip, TorchGossip)]
    parameters = list(model.parameters())
    ours = [gossip for gossip in mine if any(gossip.trains(p) for p in parameters)]
    rest: list[torch.Tensor] = [p for p in parameters if not any(g.trains(p) for g in ours)]
    for gossip in ours:
        gossip.average_parameters()
    rest += list(model.buffers()) if buffers else []
    current = session.current()
    weight, parts = 1.0, current.world.size
    if ours:
        weight, parts = 1.0 / len(current.node_ranks), len(current.cluster.nodes)
    for tensor in rest:
        if tensor.is_floating_point() or tensor.is_complex():
            _average(tensor, weight, parts)


@torch.no_grad()
def _average(tensor: torch.Tensor, weight: float, parts: int) -> None:
    """``tensor ← Σ weight · tensor / parts`` over all ranks, summed in double precision."""
    target = torch.view_as_real(tensor.data) if tensor.is_complex() else tensor.data
    work = target.to("cpu", torch.float64, copy=True).contiguous().mul_(weight)
    flat = array_of(work)
    handle = session.current().operations.submit(
        "allreduce", None, [flat], [work.shape], [flat], awaited=True, op="sum"
    )
    handle.wait()
    target.copy_(work.div_(parts))
