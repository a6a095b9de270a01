"""``GossipStrategy``: gossip training for Lightning; needs the extra ``lightning``.

    trainer = Trainer(strategy=GossipStrategy(method="crossover"), accelerator="cpu", devices=1)

Start the program with ``horovodrun -np N`` or ``mpirun``; each process drives one device. Weights
begin as rank 0's. A checkpoint holds rank 0's replica; ``merge_on_fit_end`` makes one model of all
when training ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import gossip_hvd.torch as hvd

T = TypeVar("T")
REDUCTIONS = {
    "sum": hvd.Sum,
    "mean": hvd.Average,
    "avg": hvd.Average,
    "max": hvd.Max,
    "min": hvd.Min,
}


class GossipStrategy(ParallelStrategy):  # type: ignore[misc]
    """Every optimizer of the module becomes a ``DistributedOptimizer``.

    Args:
        accelerator: as Lightning's strategies'.
        checkpoint_io: likewise.
        precision_plugin: likewise.
        horovod_scope: of ``hvd.init``, which is called if it has not been.
        node_size: of ``hvd.init``.
        merge_on_fit_end: replace the weights by their mean over nodes when training ends.
        options: of ``DistributedOptimizer``, such as ``method`` and ``timing``.
    """

    strategy_name = "gossip"
    is_distributed = True  # Lightning shares samples among ranks only where it finds this

    def __init__(
        self,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        *,
        horovod_scope: str | None = None,
        node_size: int | None = None,
        merge_on_fit_end: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        if not hvd.is_initialized():
            hvd.init(horovod_scope=horovod_scope, node_size=node_size)
        rank_zero_only.rank = hvd.rank()
        self._merge, self._options = merge_on_fit_end, options

    # Who and where --------------------------------------------------------------------------

    @property
    def global_rank(self) -> int:
        """Rank in the world."""
        return hvd.rank()

    @property
    def local_rank(self) -> int:
        """Rank on this machine."""
        return hvd.local_rank()

    @property
    def node_rank(self) -> int:
        """Which machine this is."""
        return hvd.cross_rank()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return hvd.size()

    @property
    def root_device(self) -> torch.device:
        """This rank's device: the GPU of its local rank, where GPUs are asked for."""
        devices: list[torch.device] | None = self.parallel_devices
        if not devices or devices[0].type == "cpu":
            return torch.device("cpu")
        return devices[self.local_rank] if len(devices) > 1 else devices[0]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How Lightning shares samples among ranks."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # Training -------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Move the model, start from rank 0's weights, wrap the optimizers."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        assert self.model is not None  # type: ignore[has-type]
        self.model = self.precision_plugin.convert_module(self.model)  # type: ignore[has-type]
        hvd.broadcast_parameters(self.model.state_dict(), root_rank=0)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                self._wrap(optimizer)
        self.setup_precision_plugin()

    def model_to_device(self) -> None:
        """Move the model to this rank's device."""
        assert self.model is not None
        self.model.to(self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let backward passes accumulate gradients without averaging them."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                stack.enter_context(optimizer.gossip.no_sync())
            yield

    def on_train_end(self) -> None:
        """Make one model of all replicas, where that was asked for."""
        super().on_train_end()
        if self._merge and self.lightning_module is not None:
            hvd.average_parameters(self.lightning_module)

    def teardown(self) -> None:
        """Move the model back to the host; MPI and Horovod stay up for the next run."""
        self.cpu_and_accelerator_teardown()

    def cpu_and_accelerator_teardown(self) -> None:
        """What Lightning's plain strategies do in ``teardown``."""
        if self.lightning_module is not None and self.root_device.type != "cpu":
            self.lightning_module.cpu()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        if "gossip" not in vars(optimizer):
            assert self.model is not None
            hvd.DistributedOptimizer(optimizer, self.model.named_parameters(), **self._options)

    # World-wide operations ------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        hvd.barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """One rank's object for all."""
        return hvd.broadcast_object(obj, src)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> Any:
        """All ranks' tensors in a new first dimension."""
        with torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
            return hvd.allgather(tensor.unsqueeze(0))

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean, sum, … of a tensor over ranks."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        name = str(reduce_op or "mean").rpartition(".")[2].lower()
        if name in ("mean", "avg") and not tensor.is_floating_point():
            tensor = tensor.float()
        return hvd.allreduce(tensor, op=REDUCTIONS[name])
