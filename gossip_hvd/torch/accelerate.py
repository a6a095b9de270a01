"""``GossipAccelerator``: gossip training for Accelerate; needs the extra ``accelerate``.

    accelerator = GossipAccelerator(gossip={"method": "crossover"})      # was: Accelerator()

Start the program with ``horovodrun -np N`` or ``mpirun``, not with ``accelerate launch``.
Accelerate itself sees one process and wraps nothing; ranks, data and reductions are ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler, get_sampler
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, recursively_apply

import gossip_hvd.torch as hvd
from gossip_hvd.errors import ConfigError

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
        arguments["dataloader_config"] = _loading(arguments.get("dataloader_config"))
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
        """Share a data loader's batches among ranks, shuffled alike everywhere.

        Every rank reads an ``IterableDataset`` whole and keeps its share; so it must give all
        ranks the same samples in the same order.
        """
        prepared = super().prepare_data_loader(*args, **kwargs)
        sampler = get_sampler(prepared)
        if isinstance(sampler, SeedableRandomSampler):
            sampler.initial_seed = hvd.broadcast_object(sampler.initial_seed)
        generator = getattr(prepared, "synchronized_generator", None)
        if generator is not None:
            generator.set_state(hvd.broadcast_object(generator.get_state()))
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

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let rank 0 through the block first, and all others after it."""
        with _first(self.is_main_process):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Let the first rank of every host through the block first, and all others after them."""
        with _first(self.is_local_main_process):
            yield

    def gather(self, tensor: Any) -> Any:
        """All ranks' rows of tensors, also nested in lists, tuples and dicts."""
        return _each(_gathered, tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As ``gather``, without the samples that only filled up the last batch.

        Lists of anything but tensors are put behind each other, as Accelerate does.
        """
        as_objects = use_gather_object or not _only_tensors(input_data)
        gathered = _in_a_row(input_data) if as_objects else self.gather(input_data)
        rest = self.gradient_state.remainder
        if self.gradient_state.end_of_dataloader and rest > 0:
            return gathered[:rest] if as_objects else _each(lambda t: t[:rest], gathered)
        return gathered

    def pad_across_processes(
        self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False
    ) -> Any:
        """Tensors as long in one dimension as the longest of all ranks.

        Args:
            tensor: a tensor, or several nested in lists, tuples and dicts; those that lack the
                dimension, and nested tensors, stay as they are.
            dim: the dimension.
            pad_index: the value that fills them up.
            pad_first: fill up in front instead of behind.
        """

        def padded(t: torch.Tensor) -> torch.Tensor:
            if t.is_nested or not -t.dim() <= dim < t.dim():
                return t
            shape = list(t.shape)
            longest = int(hvd.allreduce(torch.tensor([shape[dim]]), op=hvd.Max))
            if longest == shape[dim]:
                return t
            shape[dim] = longest - shape[dim]
            filling = t.new_full(shape, pad_index)
            return torch.cat([filling, t] if pad_first else [t, filling], dim)

        return _each(padded, tensor)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum or mean of tensors over ranks."""
        if reduction == "none":
            return tensor
        op = {"sum": hvd.Sum, "mean": hvd.Average}[reduction]

        def reduced(t: torch.Tensor) -> Any:
            return hvd.allreduce(t, op=op, prescale_factor=scale)

        return _each(reduced, tensor)

    def end_training(self) -> None:
        """Close trackers and wait for all ranks."""
        super().end_training()
        hvd.barrier()


def _each(function: Callable[[torch.Tensor], torch.Tensor], data: Any) -> Any:
    """``function`` of all tensors in nested lists, tuples and mappings; of nothing else."""
    return recursively_apply(function, data, error_on_other_type=True)


def _gathered(tensor: torch.Tensor) -> Any:
    return hvd.allgather(tensor.unsqueeze(0) if tensor.dim() == 0 else tensor)


def _only_tensors(data: Any) -> bool:
    try:
        _each(lambda t: t, data)
    except TypeError:
        return False
    return True


def _in_a_row(data: Any) -> list[Any]:
    return [item for part in hvd.allgather_object(data) for item in part]


@contextmanager
def _first(now: bool) -> Iterator[None]:
    """Some ranks first: the others wait in front of the block until those are through."""
    if not now:
        hvd.barrier()
    yield
    if now:
        hvd.barrier()


def _loading(wanted: DataLoaderConfiguration | None) -> DataLoaderConfiguration:
    """How data are loaded: each rank reads its own, since Accelerate knows of no other.

    Raises:
        ConfigError: where rank 0 shall read for all, which Accelerate would do for itself alone.
    """
    config = wanted or DataLoaderConfiguration(use_seedable_sampler=True)
    if config.dispatch_batches:
        raise ConfigError(
            "dispatch_batches=True: each rank reads its own batches here. Leave it out; an "
            "IterableDataset is then read on every rank, and each keeps its share."
        )
    return replace(config, dispatch_batches=False)


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
