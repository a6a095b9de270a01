"""``recalibrate_batch_norm``: batch norm's statistics, measured anew for merged weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from horovod.torch import Sum
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from gossip_hvd.errors import ConfigError
from gossip_hvd.torch.allreduce import allreduce


@torch.no_grad()
def recalibrate_batch_norm(
    model: torch.nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | int | None = None,
) -> None:
    """Measure running means and variances over the batches of all ranks; all ranks must call.

    A layer's statistics describe what its own replica's weights make of the data. The mean of
    several replicas' weights makes something else of it, the more so the further they are apart,
    so statistics are not averaged but measured, after the weights have been merged
    (``average_parameters``). The result is that of ``torch.optim.swa_utils.update_bn`` over the
    batches of all ranks in one process, the same bits everywhere.

    Args:
        model: with equal weights on every rank.
        loader: this rank's training data: inputs, or tuples that begin with them. Ranks may have
            different numbers of batches, unless batch norm is synchronised between them.
        device: where to put the inputs.

    Raises:
        ConfigError: on every rank, where no rank has a batch.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    update_bn(loader, model, device)  # type: ignore[arg-type]
    counts = torch.stack([_count(layer) for layer in layers]).to("cpu", torch.float64)
    own = torch.cat([_statistics(layer) * n for layer, n in zip(layers, counts, strict=True)])
    total = allreduce(torch.cat([counts, own]), name="gossip_hvd.recalibrate", op=Sum)
    batches, sums = total[: len(layers)], total[len(layers) :]
    if not batches.min():
        raise ConfigError("recalibrate_batch_norm: no rank's loader has given a batch.")
    widths = [2 * layer.num_features for layer in layers]
    parts = sums.split(widths)  # type: ignore[no-untyped-call]
    for layer, n, part in zip(layers, batches, parts, strict=True):
        mean, variance = (part / n).chunk(2)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        _count(layer).fill_(int(n))


def _count(layer: _BatchNorm) -> torch.Tensor:
    """How many batches a layer has measured."""
    assert layer.num_batches_tracked is not None
    return layer.num_batches_tracked


def _statistics(layer: _BatchNorm) -> torch.Tensor:
    """A layer's running mean and variance in one vector."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return torch.cat([layer.running_mean, layer.running_var]).to("cpu", torch.float64)
