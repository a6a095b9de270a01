"""The names of ``gossip_hvd.tensorflow``: Horovod's, and what gossip adds to them."""

from __future__ import annotations

from typing import Any, NoReturn

from horovod.tensorflow import (
    Adasum,
    Average,
    Compression,
    Max,
    Min,
    ProcessSet,
    Product,
    Sum,
    ccl_built,
    cuda_built,
    ddl_built,
    global_process_set,
    gloo_built,
    gloo_enabled,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rocm_built,
    start_timeline,
    stop_timeline,
)

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
from gossip_hvd.tensorflow.basics import init, is_initialized, node_process_set, shutdown
from gossip_hvd.tensorflow.collectives import (
    allgather,
    allreduce,
    alltoall,
    broadcast,
    broadcast_,
    broadcast_variables,
    grouped_allgather,
    grouped_allreduce,
    grouped_reducescatter,
    reducescatter,
)
from gossip_hvd.tensorflow.functions import (
    allgather_object,
    average_variables,
    barrier,
    broadcast_object,
    gossip_of,
    join,
)
from gossip_hvd.tensorflow.keras.optimizer import DistributedOptimizer
from gossip_hvd.tensorflow.tape import DistributedGradientTape


def _refused(name: str, why: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(f"{name} {why}")

    refuse.__name__ = name
    refuse.__doc__ = f"Refused: ``{name}`` {why}"
    return refuse


broadcast_global_variables = _refused(
    "broadcast_global_variables",
    "is for TensorFlow 1's global variables: use broadcast_variables(model.variables, root_rank).",
)
BroadcastGlobalVariablesHook = _refused(
    "BroadcastGlobalVariablesHook",
    "is for TensorFlow 1's sessions: use broadcast_variables(model.variables, root_rank).",
)
PartialDistributedGradientTape = _refused(
    "PartialDistributedGradientTape",
    "keeps some layers local to a rank, and a node's ranks must stay equal: use "
    "DistributedGradientTape, and another tape for the local layers.",
)
SyncBatchNormalization = _refused(
    "SyncBatchNormalization",
    "of Horovod does not exist for Keras 3: use keras.layers.BatchNormalization, or "
    "GroupNormalization, which needs no other rank.",
)

__all__ = [
    "Adasum",
    "Average",
    "BroadcastGlobalVariablesHook",
    "Compression",
    "ConfigError",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "GossipError",
    "Max",
    "Min",
    "PartialDistributedGradientTape",
    "PeerLostError",
    "ProcessSet",
    "Product",
    "StallError",
    "Sum",
    "SyncBatchNormalization",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "average_variables",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "gossip_of",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "init",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "node",
    "node_process_set",
    "node_rank",
    "node_size",
    "nodes",
    "rank",
    "reducescatter",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]
