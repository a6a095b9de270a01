"""``SyncBatchNorm``: batch norm with the statistics of all ranks of a node, on CPU and GPU.

    μ = Σᵢ Σx / n        σ² = Σᵢ Σ(x − μ)² / n        over the n values that the node's ranks hold

Statistics stay inside the node in both scopes: between nodes they are as different as the weights
are, and nothing there waits. ``SyncBatchNorm(…, process_set=hvd.global_process_set)`` takes those
of the whole world instead, as Horovod's does. Sums are taken in float32 at least, in two passes,
so that a large mean does not eat the variance. Ranks may hold different numbers of values.
"""

from __future__ import annotations

from typing import Any

import torch
from horovod.torch import Sum
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from gossip_hvd.torch.allreduce import allreduce_
from gossip_hvd.torch.process_sets import ProcessSet, node_process_set


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the ranks of a node; arguments as ``torch.nn.BatchNorm2d``'s.

    Args:
        num_features: channels C of an input (N, C, …).
        eps: added to the variance.
        momentum: of the running statistics; None for a plain average of all batches.
        affine: whether to learn weight and bias.
        track_running_stats: whether to keep running statistics.
        process_set: the ranks whose statistics are put together; by default this rank's node.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        process_set: ProcessSet | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self._process_set = process_set

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch."""
        self._check_input_dim(input)
        members = self._process_set or node_process_set()
        if not self.training and self.track_running_stats:
            members = None
        if members is None or (members.size() or 1) == 1:
            return super().forward(input)
        output, mean, variance, count = _Normalise.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.eps, members
        )
        if self.training and self.track_running_stats:
            self._track(mean, variance, count)
        result: Tensor = output
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        batches, means, variances = self.num_batches_tracked, self.running_mean, self.running_var
        assert batches is not None
        assert means is not None
        assert variances is not None
        batches.add_(1)
        momentum = 1.0 / float(batches) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        means.lerp_(mean.to(means.dtype), momentum)
        variances.lerp_(unbiased.to(variances.dtype), momentum)


class _Normalise(torch.autograd.Function):
    """y = w (x − μ) / √(σ² + ε) + b with the statistics of several ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, members: Any
    ) -> Any:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        others = [0, *range(2, x.dim())]
        values = x.to(wide)
        size = torch.full((1,), x.numel() / x.shape[1], dtype=wide, device=x.device)
        total = _sum(torch.cat([values.sum(others), size]), members, "sum")
        count = total[-1]
        mean = total[:-1] / count
        centred = values - _wide(mean, x)
        variance = _sum(centred.square().sum(others), members, "squares") / count
        scale = (variance + eps).rsqrt()
        normal = centred * _wide(scale, x)
        y = normal if weight is None else normal * _wide(weight.to(wide), x)
        if bias is not None:
            y = y + _wide(bias.to(wide), x)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.members, ctx.others = members, others
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        x, weight, mean, scale, count = ctx.saved_tensors
        wide, others = mean.dtype, ctx.others
        dy = gradient.to(wide)
        normal = (x.to(wide) - _wide(mean, x)) * _wide(scale, x)
        dy_sum, dy_dot = dy.sum(others), (dy * normal).sum(others)
        dx = None
        if ctx.needs_input_grad[0]:
            both = _sum(torch.cat([dy_sum, dy_dot]), ctx.members, "gradients")
            mean_sum, mean_dot = (both / count).chunk(2)
            factor = scale if weight is None else scale * weight.to(wide)
            dx = (dy - _wide(mean_sum, x) - normal * _wide(mean_dot, x)) * _wide(factor, x)
            dx = dx.to(x.dtype)
        # Weight and bias get this rank's part; the optimizer averages over ranks.
        learned = weight is not None
        return (
            dx,
            dy_dot.to(weight.dtype) if learned and ctx.needs_input_grad[1] else None,
            dy_sum.to(weight.dtype) if learned and ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _sum(values: Tensor, members: Any, what: str) -> Tensor:
    return allreduce_(values, name=f"sync_batch_norm.{what}", op=Sum, process_set=members)


def _wide(channels: Tensor, like: Tensor) -> Tensor:
    """One number a channel, in a shape that goes with (N, C, …)."""
    return channels.view(1, -1, *[1] * (like.dim() - 2))
