"""The Keras 3 adapter: ``import gossip_hvd.tensorflow.keras as hvd`` for Horovod's.

It runs on the backend that Keras runs on, TensorFlow or PyTorch; ``gossip_hvd.keras`` is the same.
"""

from __future__ import annotations

from typing import Any

from gossip_hvd.errors import ConfigError, GossipError, PeerLostError, StallError
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
from gossip_hvd.session import is_initialized, shutdown
from gossip_hvd.tensorflow.functions import (
    allgather_object,
    average_variables,
    barrier,
    broadcast_object,
    broadcast_variables,
    gossip_of,
    join,
)
from gossip_hvd.tensorflow.keras import callbacks
from gossip_hvd.tensorflow.keras.backend import framework
from gossip_hvd.tensorflow.keras.basics import init, node_process_set
from gossip_hvd.tensorflow.keras.loading import load_model
from gossip_hvd.tensorflow.keras.optimizer import DistributedOptimizer
from gossip_hvd.tensorflow.keras.recalibration import recalibrate_batch_norm
from gossip_hvd.tensorflow.keras.values import allgather, allreduce, broadcast, reducescatter
from gossip_hvd.tensorflow.process_sets import add_process_set, remove_process_set
from gossip_hvd.tensorflow.refused import (
    PartialDistributedOptimizer,
    broadcast_global_variables,
    elastic,
)

HOROVODS = (
    "Adasum",
    "Average",
    "Compression",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "ccl_built",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rocm_built",
    "start_timeline",
    "stop_timeline",
)
"""Names that are those of the backend's own Horovod."""


def __getattr__(name: str) -> Any:
    if name in HOROVODS:
        return getattr(framework().hvd, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    *HOROVODS,
    "ConfigError",
    "DistributedOptimizer",
    "GossipError",
    "PartialDistributedOptimizer",
    "PeerLostError",
    "StallError",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "average_variables",
    "barrier",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "cross_rank",
    "cross_size",
    "elastic",
    "gossip_of",
    "init",
    "is_initialized",
    "join",
    "load_model",
    "local_rank",
    "local_size",
    "node",
    "node_process_set",
    "node_rank",
    "node_size",
    "nodes",
    "rank",
    "recalibrate_batch_norm",
    "reducescatter",
    "remove_process_set",
    "shutdown",
    "size",
]
