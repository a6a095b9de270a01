"""Start and stop, and who is who: ranks mean the world, nodes have names of their own."""

from __future__ import annotations

from typing import Any

import horovod.torch as horovod

from gossip_hvd import session
from gossip_hvd.ranks import (
    cross_rank,
    cross_size,
    local_rank,
    local_size,
    node,
    node_rank,
    node_size,
    nodes,
    rank,
    size,
)
from gossip_hvd.torch.process_sets import global_process_set, register

__all__ = [
    "cross_rank",
    "cross_size",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "node",
    "node_rank",
    "node_size",
    "nodes",
    "rank",
    "shutdown",
    "size",
]


def init(
    comm: Any = None,
    process_sets: Any = None,
    *,
    horovod_scope: str | None = None,
    node_size: int | None = None,
) -> None:
    """Start MPI and Horovod; call it once, before anything else of this module.

    Args:
        comm: an mpi4py communicator or a list of world ranks; by default all ranks.
        process_sets: a list of ``ProcessSet``s, or ``"dynamic"``.
        horovod_scope: ``"node"``: Horovod lives inside the node and never waits for another
            one; ``"world"``: one world-wide Horovod with a process set a node, for scripts that
            call Horovod's own world operations. By default ``GOSSIP_HVD_SCOPE``, else ``"node"``.
        node_size: groups every so many consecutive ranks into a virtual node. By default
            ``GOSSIP_HVD_NODE_SIZE``, else nodes are physical machines.

    Raises:
        ConfigError: for a setting that cannot work, or that differs between ranks; a second call
            with other arguments.
    """
    fresh = not session.is_initialized() or "torch" not in session.current().frameworks
    session.init(
        "torch", horovod, comm, process_sets, horovod_scope=horovod_scope, node_size=node_size
    )
    current = session.current()
    global_process_set.ranks = list(range(current.world.size))
    if fresh and current.scope == "node":
        register(process_sets)


shutdown = session.shutdown
is_initialized = session.is_initialized
