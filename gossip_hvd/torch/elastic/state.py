"""``TorchState``: what is saved, restored and made equal together, and who handles its parts."""

from __future__ import annotations

from typing import Any

import torch
from horovod.common.elastic import ObjectState
from horovod.torch.elastic import state as horovods
from horovod.torch.elastic.sampler import ElasticSampler
from horovod.torch.elastic.state import StateHandler

from gossip_hvd import session
from gossip_hvd.torch.functions import (
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)

__all__ = [
    "ModelStateHandler",
    "OptimizerStateHandler",
    "SamplerStateHandler",
    "StateHandler",
    "TorchState",
    "get_handler_registry",
    "set_handler_registry",
]


class ModelStateHandler(horovods.ModelStateHandler):  # type: ignore[misc]
    """A model."""

    def sync(self) -> None:
        """Take the weights of rank 0."""
        broadcast_parameters(self.value.state_dict(), root_rank=0)
        self.save()


class OptimizerStateHandler(horovods.OptimizerStateHandler):  # type: ignore[misc]
    """An optimizer."""

    def sync(self) -> None:
        """Take the state of rank 0."""
        broadcast_optimizer_state(self.value, root_rank=0)
        self.save()


class SamplerStateHandler(horovods.SamplerStateHandler):  # type: ignore[misc]
    """A sampler."""

    def sync(self) -> None:
        """Take the state of rank 0."""
        self.value.load_state_dict(broadcast_object(self.value.state_dict()))
        self.save()


Registry = list[tuple[type, type[StateHandler]]]
_registry: Registry = [
    (torch.nn.Module, ModelStateHandler),
    (torch.optim.Optimizer, OptimizerStateHandler),
    (ElasticSampler, SamplerStateHandler),
]


def get_handler_registry() -> Registry:
    """Which handler has which type; the first that fits is taken."""
    return _registry


def set_handler_registry(registry: Registry) -> None:
    """Replace what ``get_handler_registry`` gives."""
    global _registry
    _registry = registry


class TorchState(horovods.TorchState):  # type: ignore[misc]
    """Model, optimizer, samplers and numbers that are saved, restored and made equal together.

    Args:
        model: optional.
        optimizer: optional.
        kwargs: further attributes; those that have a handler are handled by it.
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
            kind = next((h for known, h in _registry if isinstance(value, known)), None)
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
