"""Crossover-SGD's recipe for very large batches: LARS, and weight decay that follows the rate.

    local = trust · ‖w‖ / (‖g‖ + decay · ‖w‖ + ε)          for tensors of two or more dimensions
    local = 1, decay = 0                                    for biases and norms
    v ← μ v + local · γ (g + decay · w) ;   w ← w − v

| authors' code | here |
|---|---|
| 0.0025, 0.96, 5e-5, 1e-9 | the defaults of ``trust``, ``momentum``, ``weight_decay``, ``eps`` |
| lr(t) and wd(t), the same factor | ``DecayingWithRate(optimizer, warm_up_and_decay …)`` |

The norms are those of this node's weights and of its averaged gradient; nothing of LARS travels.

Differs from the authors' code: a tensor of zeros, or without gradient, has local = 1 (there 0, so
that it would stay zero for ever).

References: You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017
(arXiv 1708.03888); Yeo et al., arXiv 2012.15198.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate every weight tensor scales by its own norms.

    Args:
        params: as for every optimizer.
        lr: γ.
        momentum: μ; the rate is inside the buffer, so a change of γ acts on new gradients only.
        weight_decay: of tensors of two or more dimensions.
        trust: LARS's coefficient.
        eps: keeps the quotient finite.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.96,
        weight_decay: float = 5e-5,
        trust: float = 0.0025,
        eps: float = 1e-9,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        wrong = [name for name, value in given.items() if value < 0]
        if wrong:
            raise ValueError(f"LARS: {wrong[0]}={given[wrong[0]]} is below zero.")
        super().__init__(params, {**given, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: torch.Tensor, g: torch.Tensor, group: dict[str, Any]) -> None:
        local: torch.Tensor | float = 1.0
        if p.ndim > 1:
            decay = group["weight_decay"]
            w, size = p.norm(), g.norm()
            scaled = group["trust"] * w / (size + decay * w + group["eps"])
            local = torch.where((w > 0) & (size > 0), scaled, torch.ones_like(scaled))
            g = g.add(p, alpha=decay)
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        v = state["momentum_buffer"]
        v.mul_(group["momentum"]).add_(g * (local * group["lr"]))
        p.sub_(v)


class DecayingWithRate(LRScheduler):
    """Multiplies learning rate *and* weight decay of every group by one factor of the step.

    Args:
        optimizer: any; step this once after each of its steps.
        factor: of the number of steps so far, such as
            ``lambda step: warm_up_and_decay(step, len(loader))``.
        last_epoch: steps so far; −1 for none.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[int], float],
        last_epoch: int = -1,
    ) -> None:
        self.factor = factor
        for group in optimizer.param_groups:
            group.setdefault("initial_weight_decay", group["weight_decay"])
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rates of this step; the decays are set on the way."""
        factor = self.factor(self.last_epoch)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = group["initial_weight_decay"] * factor
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Without the function."""
        return {k: v for k, v in super().state_dict().items() if k != "factor"}
