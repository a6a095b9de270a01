"""Start and stop, and who is who: ranks mean the world, nodes have names of their own."""

from __future__ import annotations

from typing import Any

import horovod.torch as horovod

from gossip_hvd import session


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
        process_sets: further ``ProcessSet``s, in scope ``"world"`` only.
        horovod_scope: ``"node"``: Horovod lives inside the node and never waits for another
            one; ``"world"``: one world-wide Horovod with a process set a node, for scripts that
            call Horovod's own world operations. By default ``GOSSIP_HVD_SCOPE``, else ``"node"``.
        node_size: groups every so many consecutive ranks into a virtual node. By default
            ``GOSSIP_HVD_NODE_SIZE``, else nodes are physical machines.

    Raises:
        ConfigError: for a setting that cannot work, or that differs between ranks; a second call
            with other arguments.
    """
    session.init(
        "torch", horovod, comm, process_sets, horovod_scope=horovod_scope, node_size=node_size
    )


shutdown = session.shutdown
is_initialized = session.is_initialized


def rank() -> int:
    """This process's rank among all."""
    return session.current().world.rank


def size() -> int:
    """Number of all ranks."""
    return session.current().world.size


def local_rank() -> int:
    """Rank on this physical machine; scripts pick their GPU by it."""
    return session.current().world.local_rank


def local_size() -> int:
    """Ranks on this physical machine."""
    return session.current().world.local_size


def cross_rank() -> int:
    """Which physical machine this is, among those that have this local rank."""
    return session.current().world.cross_rank


def cross_size() -> int:
    """Physical machines that have this local rank."""
    return session.current().world.cross_size


def node() -> int:
    """The node of gossip that this rank belongs to."""
    return session.current().node


def nodes() -> int:
    """Number of nodes of gossip."""
    return len(session.current().cluster.nodes)


def node_rank() -> int:
    """Rank inside this node of gossip."""
    running = session.current()
    return running.cluster.node_rank(running.world.rank)


def node_size() -> int:
    """Ranks of this node of gossip."""
    return len(session.current().node_ranks)


def node_process_set() -> Any:
    """Horovod's process set of this node; None for a node of one rank."""
    return session.current().process_sets["torch"]


def barrier() -> None:
    """Return when every rank of the world has come here."""
    session.current().world.barrier("barrier")
