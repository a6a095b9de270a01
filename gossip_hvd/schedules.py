"""Schedules as plain functions: what counts by epoch, and Crossover-SGD's learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from gossip_hvd.errors import ConfigError

T = TypeVar("T")


def by_epoch(plan: Mapping[int, T], rounds: int) -> dict[int, T]:
    """A schedule by epoch as one by round, for ``peers`` and ``phases``.

    ``peers=by_epoch({0: 2, 30: 1}, len(loader))`` has two peers for thirty epochs.

    Args:
        plan: values by the epoch from which they count.
        rounds: optimizer steps in an epoch, equal on all ranks.
    """
    if rounds < 1:
        raise ConfigError(f"by_epoch: an epoch of {rounds} rounds; give the number of its steps.")
    return {epoch * rounds: value for epoch, value in plan.items()}


def warm_up_and_decay(
    step: int,
    steps: int,
    *,
    epochs: int = 90,
    warm_up: float = 36,
    hold: float = 2,
    power: float = 2.2,
    least: float = 0.0025,
) -> float:
    """The factor of learning rate *and* weight decay in Crossover-SGD's ImageNet recipe.

    With E epochs, of which the first E_w warm up and the last E_h hold, and t in epochs,

        t < E_w:          t / E_w
        t < E − E_h:      (1 − least) (1 − (t − E_w) / (E − E_w − E_h))^power + least
        otherwise:        least

    Reference: Yeo et al., arXiv 2012.15198; the numbers are those of the authors' code.

    Args:
        step: optimizer steps so far.
        steps: optimizer steps in an epoch.
        epochs: E, in all.
        warm_up: E_w.
        hold: E_h.
        power: of the decay.
        least: the last factor.
    """
    if steps < 1 or epochs - warm_up - hold <= 0:
        raise ConfigError(
            f"warm_up_and_decay: {epochs} epochs of {steps} steps leave no time to decay between "
            f"{warm_up} to warm up and {hold} to hold."
        )
    epoch = step / steps
    if epoch < warm_up:
        return epoch / warm_up
    left = max(0.0, 1.0 - (epoch - warm_up) / (epochs - warm_up - hold))
    return float((1.0 - least) * left**power + least)
