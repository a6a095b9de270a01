"""``GossipAccelerator``: gossip training for Accelerate; needs the extra ``accelerate``.

    accelerator = GossipAccelerator(method="crossover")      # was: Accelerator()

Start the program with ``horovodrun -np N`` or ``mpirun``, not with ``accelerate launch``.
Accelerate itself sees one process and wraps nothing; ranks, data and reductions are ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler, get_sampler
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration
from torch.utils._pytree import tree_map

import gossip_hvd.torch as hvd

LAUNCHERS = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_", "MPI_LOCAL")
PLAIN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class GossipAccelerator(Accelerator):  # type: ignore[misc]
    """An ``Accelerator`` whose optimizers gossip; make it before any other Accelerate object.

    Args:
        horovod_scope: of ``hvd.init``, which is called if it has not been.
        node_size: of ``hvd.init``.
        gossip: options of ``DistributedOptimizer``, such as ``{"method": "crossover"}``.
        arguments: as ``Accelerator``'s.
    """

    def __init__(
        self,
        *,
        horovod_scope: str | None = None,
        node_size: int | None = None,
        gossip: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        if not hvd.is_initialized():
            hvd.init(horovod_scope=horovod_scope, node_size=node_size)
        self._gossip = dict(gossip or {})
        arguments.setdefault(
            "dataloader_config", DataLoaderConfiguration(use_seedable_sampler=True)
        )
        with _hidden_launcher():
            super().__init__(**arguments)
        for state in (PartialState(), AcceleratorState()):
            state.num_processes, state.process_index = hvd.size(), hvd.rank()
            state.local_process_index = hvd.local_rank()
        if self.device.type == "cuda":
            torch.cuda.set_device(hvd.local_rank())
            PartialState().device = torch.device("cuda", hvd.local_rank())

    def prepare_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Prepare a model and start from rank 0's weights."""
        prepared = super().prepare_model(model, *args, **kwargs)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        return prepared

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: Any = None
    ) -> Any:
        """Make an optimizer gossip; prepare its model before it or in the same call."""
        if not getattr(optimizer, "_is_accelerate_prepared", False):
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = [
                (f"{i}.{name}", p)
                for i, model in enumerate(self._models)
                for name, p in model.named_parameters()
                if id(p) in mine
            ]
            known = named if len(named) == len(mine) else None
            hvd.DistributedOptimizer(optimizer, known, **self._gossip)
        return super().prepare_optimizer(optimizer, device_placement)

    def prepare_data_loader(self, *args: Any, **kwargs: Any) -> Any:
        """Share a data loader's batches among ranks, shuffled alike everywhere."""
        prepared = super().prepare_data_loader(*args, **kwargs)
        sampler = get_sampler(prepared)
        if isinstance(sampler, SeedableRandomSampler):
            sampler.initial_seed = hvd.broadcast_object(sampler.initial_seed)
        return prepared

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """Let backward passes accumulate gradients without averaging them."""
        with ExitStack() as stack:
            for optimizer in self._optimizers:
                stack.enter_context(optimizer.optimizer.gossip.no_sync())
            yield

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """Save everything; weights are rank 0's replica."""
        self._unflatten()
        return super().save_state(*args, **kwargs)

    def load_state(self, *args: Any, **kwargs: Any) -> Any:
        """Load what ``save_state`` saved, on all ranks."""
        self._unflatten()
        return super().load_state(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> Any:
        """Save a model's weights; all ranks must call."""
        self._unflatten()
        return super().save_model(*args, **kwargs)

    def _unflatten(self) -> None:
        for optimizer in self._optimizers:
            optimizer.optimizer.gossip.unflatten()

    def wait_for_everyone(self) -> None:
        """Wait for all ranks."""
        hvd.barrier()

    def gather(self, tensor: Any) -> Any:
        """All ranks' rows of tensors, also nested in lists, tuples and dicts."""
        return _each(lambda t: hvd.allgather(t.unsqueeze(0) if t.dim() == 0 else t), tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As ``gather``, without the samples that only filled up the last batch."""
        if use_gather_object:
            return [item for part in hvd.allgather_object(input_data) for item in part]
        gathered = self.gather(input_data)
        rest = self.gradient_state.remainder
        if self.gradient_state.end_of_dataloader and rest > 0:
            return _each(lambda t: t[:rest], gathered)
        return gathered

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum or mean of tensors over ranks."""
        if reduction == "none":
            return tensor
        op = {"sum": hvd.Sum, "mean": hvd.Average}[reduction]
        return _each(lambda t: hvd.allreduce(t, op=op, prescale_factor=scale), tensor)

    def end_training(self) -> None:
        """Close trackers and wait for all ranks."""
        super().end_training()
        hvd.barrier()


def _each(function: Callable[[torch.Tensor], torch.Tensor], data: Any) -> Any:
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, data)


@contextmanager
def _hidden_launcher() -> Iterator[None]:
    """Without the variables that make Accelerate start torch.distributed."""
    hidden = {k: v for k, v in os.environ.items() if k.startswith(LAUNCHERS) or k in PLAIN}
    for key in hidden:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(hidden)
