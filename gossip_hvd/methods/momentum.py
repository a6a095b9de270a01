"""Averaged momentum: the optimizer's history is mixed with the same matrix as the weights.

    x_i ← Σ_j W_ij (x_j − γ v_j) ;   v_i ← Σ_j W_ij v_j

Other treatments: *local* momentum is what every method does unless told otherwise; the
quasi-global one is in ``quasi_global.py``, DecentLaM in ``decentlam.py``.

| paper | here |
|---|---|
| v, momentum or Adam's m | slot ``"momentum"`` |
| Adam's second moment | slot ``"variance"`` |
| W | that of ``base`` |

Cost: the base's bytes for each slot: 2M with SGD's momentum, 3M with Adam. No memory but the
receive buffers.

Differs from the papers: a variance merged late is kept from falling below zero, which the
difference form does not promise.

References: GossipGraD's code (weights and history); Balu et al., "Decentralized deep learning
using momentum-accelerated consensus", ICASSP 2021; "DmSGD" in Ying et al., NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods.contract import HISTORIES, Arrival, Method, Slots, State
from gossip_hvd.methods.over import Over
from gossip_hvd.methods.registry import registered
from gossip_hvd.rounds import VARIANCE, WEIGHTS, Round, Transfer


@dataclass(frozen=True, kw_only=True)
class History(Method):
    """What all methods that touch the optimizer's history share: which slots it fills.

    Attributes:
        optimizer: whose history it is; adapters fill it in.
    """

    optimizer: str = "SGD"

    @property
    def history(self) -> tuple[str, ...]:
        """The slots of the optimizer's history."""
        return HISTORIES[self.optimizer]

    @property
    def optimizers(self) -> tuple[str, ...]:
        """All whose history is known."""
        return tuple(HISTORIES)

    def fitted(self, optimizer: str) -> Method:
        """See ``Method.fitted``."""
        return replace(super().fitted(optimizer), optimizer=optimizer)  # type: ignore[call-arg]

    def apply(self, state: State, arrival: Arrival, slots: Slots) -> None:
        """See ``Method.apply``; a mean of squares stays one."""
        super().apply(state, arrival, slots)
        if arrival.slot == VARIANCE:
            np.maximum(slots[VARIANCE], 0, out=slots[VARIANCE])


@registered
@dataclass(frozen=True)
class AveragedMomentum(History, Over):
    """The base's rounds for the weights, and the same for the optimizer's history."""

    name: ClassVar[str] = "averaged_momentum"

    @property
    def writes(self) -> tuple[str, ...]:
        """Weights and history."""
        return (*self.inner.writes, *self.history)

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``; the base must exchange weights."""
        require_weights(self, self.inner)
        return super().start(nodes, segments, seed)

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        plan = super().plan(state, number, me)
        stages = tuple(
            replace(
                stage,
                sends=tuple(self._with_history(stage.sends)),
                receives=tuple(self._with_history(stage.receives)),
            )
            for stage in plan.stages
        )
        return replace(plan, stages=stages)

    def _with_history(self, transfers: tuple[Transfer, ...]) -> Iterator[Transfer]:
        for slot in (WEIGHTS, *self.history):
            yield from (replace(transfer, slot=slot) for transfer in transfers)


def require_weights(method: Method, base: Method) -> None:
    """Refuse a base that exchanges anything but weights."""
    if base.writes != (WEIGHTS,):
        raise ConfigError(
            f"method {method.name!r} works over methods that exchange weights alone, and "
            f"{base.name!r} exchanges {', '.join(base.writes)}: use another base."
        )
