"""Names of Horovod's that have no meaning here; each says so when it is used, and what to use."""

from __future__ import annotations

from typing import Any, NoReturn

from gossip_hvd.errors import ConfigError


def _refused(name: str, why: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(f"{name} {why}")

    refuse.__name__ = name
    refuse.__doc__ = f"Refused: ``{name}`` {why}"
    return refuse


broadcast_global_variables = _refused(
    "broadcast_global_variables",
    "is for TensorFlow 1; Keras 3 has no global variables: use "
    "callbacks.BroadcastGlobalVariablesCallback(root_rank) or "
    "broadcast_variables(model.variables, root_rank).",
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
PartialDistributedOptimizer = _refused(
    "PartialDistributedOptimizer",
    "keeps some layers local to a rank, and a node's ranks must stay equal: use "
    "DistributedOptimizer, and another optimizer for the local layers.",
)
SyncBatchNormalization = _refused(
    "SyncBatchNormalization",
    "of Horovod does not exist for Keras 3: use keras.layers.BatchNormalization, or "
    "GroupNormalization, which needs no other rank.",
)


class _Elastic:
    """What stands for Horovod's ``elastic``: a job of gossip has a fixed number of ranks."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError(
            f"elastic.{name}: Horovod's elastic launcher works with Gloo only, and gossip travels "
            "over MPI. Train with a fixed number of ranks, and use callbacks.GossipCheckpoint to "
            "go on after a failure."
        )


elastic = _Elastic()
