"""The loss that ranks report before backward, as the mean over those of a node that have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as horovod
import torch

from gossip_hvd.torch.handles import watched
from gossip_hvd.waits import Facts


class NodeLoss:
    """One model's loss on the way from its ranks to their node.

    It is reduced beside the gradients, so that a rank which is out of data, and takes part in every
    reduction, takes part in this one too; it counts for nothing, as one that reported nothing.

    Args:
        name: of the Horovod operation.
        process_set: the node's; None for a node of one rank.
        siblings: says in a wait who waits for whom, and for what.
    """

    def __init__(self, name: str, process_set: Any, siblings: Callable[[str], Facts]) -> None:
        self._name, self._process_set, self._siblings = name, process_set, siblings
        self._total = torch.zeros(2, dtype=torch.float64)
        self._handle: int | None = None

    def report(self, loss: float | torch.Tensor) -> None:
        """Keep this rank's for the next reduction; a later one takes its place."""
        self._total = torch.ones(2, dtype=torch.float64)
        self._total[0] = torch.as_tensor(loss, dtype=torch.float64).detach()

    def begin(self) -> None:
        """Start to reduce what has been reported."""
        if self._process_set is not None:
            how = {"op": horovod.Sum, "process_set": self._process_set}
            self._handle = horovod.allreduce_async_(self._total, name=self._name, **how)

    def mean(self) -> float | None:
        """Wait; None where no rank of the node has reported a loss since the last time."""
        if self._handle is not None:
            watched(self._handle, lambda: self._siblings("reduce the loss"))
            self._handle = None
        total, ranks = self._total.tolist()
        self._total = torch.zeros_like(self._total)
        return total / ranks if ranks else None
