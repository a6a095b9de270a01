"""The PyTorch adapter: ``import gossip_hvd.torch as hvd`` in place of ``import horovod.torch``."""



from horovod.torch import Average, Compression, Max, Min, Product, ProcessSet, Sum
from horovod.torch import global_process_set, gloo_built, mpi_built, mpi_enabled
from horovod.torch import mpi_threads_supported, nccl_built

from gossip_hvd.errors import ConfigError, GossipError, PeerLostError, StallError
from gossip_hvd.torch.basics import (
    barrier,
    cross_rank,
    cross_size,
    init,
    is_initialized,
    local_rank,
    local_size,
    node,
    node_process_set,
    node_rank,
    node_size,
    nodes,
    rank,
    shutdown,
    size,
)
from gossip_hvd.torch.collectives import (
    allgather_object,
    allreduce,
    allreduce_,
    average_parameters,
    broadcast,
    broadcast_,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from gossip_hvd.torch.optimizer import DistributedOptimizer, Gossip

__all__ = [
    "Average",
    "Compression",
    "ConfigError",
    "DistributedOptimizer",
    "Gossip",
    "GossipError",
    "Max",
    "Min",
    "PeerLostError",
    "ProcessSet",
    "Product",
    "StallError",
    "Sum",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "average_parameters",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "cross_rank",
    "cross_size",
    "global_process_set",
    "gloo_built",
    "init",
    "is_initialized",
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
    "shutdown",
    "size",
]
