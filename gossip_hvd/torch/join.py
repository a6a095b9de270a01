"""``join`` and ``barrier``: where ranks wait for each other.

A rank that has joined follows every step that others still make: with a gradient of zero, as
Horovod counts it, but with the optimizer's own step and its part of the gossip, so that its node
and its partners go on undisturbed and its weights stay those of its node. See ``joining``.
"""

from __future__ import annotations

import gc
from typing import Any

import horovod.torch as horovod
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops

from gossip_hvd import session
from gossip_hvd.errors import ConfigError, failing_as
from gossip_hvd.gossip import running
from gossip_hvd.torch.gossip import TorchGossip
from gossip_hvd.torch.process_sets import (
    ProcessSet,
    global_process_set,
    horovod_set,
    number_of,
)
from gossip_hvd.torch.shadows import PAID


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when every rank of the process set has come here, or has joined.

    Raises:
        HorovodInternalError: where one of them never comes.
    """
    inside = horovod_set(process_set)
    if inside is not None:
        horovod.barrier(inside)
        return
    operations = session.current().operations
    with failing_as(HorovodInternalError):
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

    Raises:
        HorovodInternalError: where one of the ranks can no longer join.
    """
    current = session.current()
    gc.collect()  # Who is still running must not depend on when each rank's collector came by.
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
    for gossip in gossips.values():
        gossip.shadows.skip(PAID)
    with failing_as(HorovodInternalError):
        order = current.operations.join(lambda key: _follow(gossips, key))
    last = order[-1]
    if horovods is not None:
        # Horovod's word for it: operations between its joins are its own, and order them.
        last = int(horovod.synchronize(horovods))
    for gossip in gossips.values():
        gossip.drain()
        gossip.shadows.part([rank for rank in order if rank in current.node_ranks][-1])
    return last


def _follow(gossips: dict[str, TorchGossip], key: str) -> None:
    """One step of an optimizer that some other rank still steps."""
    if key not in gossips:
        raise ConfigError(
            f"join: another rank still trains {key!r}, whose optimizer is gone on this rank. Keep "
            "optimizers until join() has returned, and call it before going on to another model."
        )
    gossips[key].follow()


def _is_horovods() -> bool:
    """Whether Horovod reduces gradients over the world, so that its own ``join`` serves."""
    current = session.current()
    if current.scope == "node":
        return False
    if len(current.cluster.nodes) == 1:
        return True
    delegated = {gossip.delegated for gossip in running()}
    if len(delegated) > 1:
        raise ConfigError(
            "join: some optimizers gossip and others reduce over the world, in scope 'world': a "
            "rank out of data cannot follow both. Use init(horovod_scope='node')."
        )
    return True in delegated


def _join_horovod(device: int) -> Any:
    """Begin Horovod's own ``join``, so that others' world operations do not wait for this rank."""
    output = torch.tensor(-1, dtype=torch.int)
    handle = mpi_ops.mpi_lib.horovod_torch_join(output, device)
    mpi_ops._handle_map[handle] = (None, output)
    return handle
