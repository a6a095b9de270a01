"""``elastic``: Horovod's state and sampler over this library's ranks; no elastic launcher.

Horovod's elastic launcher works with Gloo only, which cannot be combined with the MPI that gossip
travels on. Scripts that use the classes run as they are under ``horovodrun`` or ``mpirun``, with
a fixed number of ranks.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

from gossip_hvd.errors import ConfigError
from gossip_hvd.torch.elastic.sampler import ElasticSampler
from gossip_hvd.torch.elastic.state import TorchState

__all__ = ["ElasticSampler", "TorchState", "run"]

R = TypeVar("R")


def run(func: Callable[..., R]) -> Callable[..., R]:
    """Make ``func(state, …)`` begin with a state that is equal on all ranks.

    Raises:
        ConfigError: when called under Horovod's elastic launcher.
    """

    @functools.wraps(func)
    def wrapper(state: Any, *args: Any, **kwargs: Any) -> R:
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            raise ConfigError(
                "Horovod's elastic launcher works with Gloo only, and gossip travels over MPI: "
                "start the job with a fixed number of ranks, `horovodrun -np N` without "
                "--min-np, --max-np and --host-discovery-script."
            )
        state.sync()
        return func(state, *args, **kwargs)

    return wrapper
