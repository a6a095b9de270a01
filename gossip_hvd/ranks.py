"""Who is who in the running job: ranks mean the world, nodes have names of their own."""

from __future__ import annotations

from gossip_hvd import session


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


def barrier() -> None:
    """Return when every rank of the world has come here."""
    session.current().world.barrier("barrier")
