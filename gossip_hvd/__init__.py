"""Gossip training for Horovod users: average inside a node, gossip weights between nodes.

Importing this package does no work: pick an adapter, ``import gossip_hvd.torch as hvd`` or
``import gossip_hvd.tensorflow as hvd``, as one would pick ``horovod.torch``.
"""

from gossip_hvd.errors import (
    ConfigError,
    GossipError,
    NotFiniteError,
    PeerLostError,
    PlanError,
    StallError,
)

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "GossipError",
    "NotFiniteError",
    "PeerLostError",
    "PlanError",
    "StallError",
    "__version__",
]
