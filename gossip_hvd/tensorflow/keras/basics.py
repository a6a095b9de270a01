"""Start and stop under Keras, with the Horovod of its backend."""

from __future__ import annotations

from typing import Any

from gossip_hvd import session
from gossip_hvd.tensorflow.keras.backend import framework


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
        horovod_scope: ``"node"`` or ``"world"``; see ``gossip_hvd.session.init``.
        node_size: groups every so many consecutive ranks into a virtual node.

    Raises:
        ConfigError: for a setting that cannot work, or that differs between ranks; a Keras
            backend that cannot gossip.
    """
    below = framework()
    session.init(
        below.name,
        below.hvd,
        comm,
        process_sets,
        horovod_scope=horovod_scope,
        node_size=node_size,
        packages=("keras",),
    )


def node_process_set() -> Any:
    """Horovod's process set of this node; None for a node of one rank."""
    return session.current().process_sets[framework().name]
