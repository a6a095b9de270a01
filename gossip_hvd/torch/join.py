"""``join`` and ``barrier``: where ranks wait for each other.

A rank that has joined follows every step that others still make: with a gradient of zero, as
Horovod counts it, but with the optimizer's own step and its part of the gossip, so that its node
and its partners go on undisturbed and its weights stay those of its node. See ``joining``.
"""

from __future__ import annotations

from typing import Any

import horovod.torch as horovod
import torch
from horovod.torch import mpi_ops

from gossip_hvd import session
from gossip_hvd.gossip import running
from gossip_hvd.torch.optimizer import TorchGossip
from gossip_hvd.torch.process_sets import (
    ProcessSet,
    global_process_set,
    horovod_set,
    node_process_set,
    number_of,
)


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when every rank of the process set has come here, or has joined."""
    inside = horovod_set(process_set)
    if inside is not None:
        horovod.barrier(inside)
        return
    operations = session.current().operations
    operations.submit("barrier", None, members=number_of(process_set)).wait()


def join(device: int = -1) -> int:
    """Say that this rank is out of data, and go on helping until every rank has said so.

    Until then this rank follows the optimizer steps of the others, and takes part in their
    world-wide operations with values that change nothing. At the end every rank has made equally
    many steps, and the ranks of a node have the weights of the one of them that joined last.
    Where Horovod reduces gradients over the world itself, Horovod's own ``join`` does the same,
    but that joined ranks make no steps; afterwards all have the last one's weights.

    Args:
        device: Horovod's argument.

    Returns:
        The rank that joined last.
    """
    current = session.current()
    if _is_horovods():
        last = int(horovod.join(device))
        current.operations.renumber()
        # Horovod leaves every rank with the weights of its own last step.
        for gossip in running():
            if isinstance(gossip, TorchGossip):
                gossip.equalize(last, global_process_set)
        return last
    horovods = _join_horovod(device) if current.scope == "world" else None
    gossips = {gossip.key: gossip for gossip in running() if isinstance(gossip, TorchGossip)}
    order = current.operations.join(lambda key: gossips[key].follow())
    if horovods is not None:
        horovod.synchronize(horovods)
    for gossip in gossips.values():
        gossip.drain()
        if len(current.node_ranks) > 1:
            gossip.equalize(
                [rank for rank in order if rank in current.node_ranks][-1], node_process_set()
            )
    return order[-1]


def _is_horovods() -> bool:
    """Whether Horovod reduces gradients over the world, so that its own ``join`` serves."""
    current = session.current()
    reduces = any(gossip.delegated for gossip in running())
    return current.scope == "world" and (reduces or len(current.cluster.nodes) == 1)


def _join_horovod(device: int) -> Any:
    """Begin Horovod's own ``join``, so that others' world operations do not wait for this rank."""
    output = torch.tensor(-1, dtype=torch.int)
    handle = mpi_ops.mpi_lib.horovod_torch_join(output, device)
    mpi_ops._handle_map[handle] = (None, output)
    return handle
