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

import torch
from horovod.common.elastic import ObjectState
from horovod.torch.elastic import sampler as horovods
from horovod.torch.elastic import state as states

from gossip_hvd import session
from gossip_hvd.errors import ConfigError
from gossip_hvd.torch.functions import (
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)

__all__ = ["ElasticSampler", "TorchState", "run"]

R = TypeVar("R")


class ElasticSampler(horovods.ElasticSampler):  # type: ignore[misc]
    """Horovod's sampler, over all ranks in both scopes; arguments as Horovod's."""

    def reset(self) -> None:
        """Share what is left of this epoch among the ranks there are now."""
        world = session.current().world
        ranks = horovods.rank, horovods.size
        horovods.rank, horovods.size = (lambda: world.rank), (lambda: world.size)
        try:
            super().reset()
        finally:
            horovods.rank, horovods.size = ranks


class _Model(states.ModelStateHandler):  # type: ignore[misc]
    def sync(self) -> None:
        broadcast_parameters(self.value.state_dict(), root_rank=0)
        self.save()


class _Optimizer(states.OptimizerStateHandler):  # type: ignore[misc]
    def sync(self) -> None:
        broadcast_optimizer_state(self.value, root_rank=0)
        self.save()


class _Sampler(states.SamplerStateHandler):  # type: ignore[misc]
    def sync(self) -> None:
        self.value.load_state_dict(broadcast_object(self.value.state_dict()))
        self.save()


HANDLERS = (
    (torch.nn.Module, _Model),
    (torch.optim.Optimizer, _Optimizer),
    (horovods.ElasticSampler, _Sampler),
)


class TorchState(states.TorchState):  # type: ignore[misc]
    """Model, optimizer, samplers and numbers that are saved, restored and made equal together.

    Args:
        model: optional.
        optimizer: optional.
        kwargs: further attributes; models, optimizers and samplers among them are handled as such.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        everything = {**kwargs, "model": model, "optimizer": optimizer}
        handlers, rest = {}, {}
        for name, value in everything.items():
            kind = next((h for known, h in HANDLERS if isinstance(value, known)), None)
            if kind is None:
                rest[name] = value
            else:
                handlers[name] = kind(value)
        self._handlers = handlers
        for name, handler in handlers.items():
            setattr(self, name, handler.value)
        ObjectState.__init__(
            self,
            bcast_object=broadcast_object,
            get_rank=lambda: session.current().world.rank,
            **rest,
        )


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
