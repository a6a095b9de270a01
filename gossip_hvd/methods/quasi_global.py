"""Quasi-global momentum: the buffer follows the movement that mixing has left, not the gradient.

    SGD    m = μ m̂ + g ;  x½ = x − η m  (Nesterov: x − η (g + μ m)) ;  x⁺ = Σ_j W_ij x½_j
           m̂ ← μ m̂ + (1 − μ) (x − x⁺) / η
    Adam   m = β1 m̂ + (1 − β1) g ;  v = β2 v̂ + (1 − β2) g² ;  x½, x⁺ as above
           d = (x − x⁺) / ‖x − x⁺‖
           m̂ ← β1 m̂ + (1 − β1) d ;  v̂ ← β2 v̂ + (1 − β2) d²

The optimizer makes m and v itself: before its step its buffers are set to m̂ and v̂.

| paper | here |
|---|---|
| μ, β1 | ``mu``; must be the optimizer's own |
| β2 | ``beta2`` |
| η | the learning rate of each element |
| x, m̂, v̂ | replicas ``"qg_start"``, ``"qg_momentum"``, ``"qg_variance"`` |
| W | that of ``base`` |

Cost: nothing on the wire; memory two models a rank (three with Adam).

Differs from the authors' code: the movement is that of every step, also of one without exchange;
where the learning rate is 0 nothing has moved. With one node it is the plain optimizer.

Reference: Lin, Karimireddy, Stich, Jaggi, "Quasi-global momentum: accelerating decentralized deep
learning on heterogeneous data", ICML 2021 (arXiv 2102.04761).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gossip_hvd.methods.contract import RATE, Slots, State
from gossip_hvd.methods.momentum import History, require_weights
from gossip_hvd.methods.over import Over
from gossip_hvd.methods.registry import registered
from gossip_hvd.mixing import Array, accumulator
from gossip_hvd.rounds import MOMENTUM, VARIANCE, WEIGHTS

START = "qg_start"
TRACKED = {MOMENTUM: "qg_momentum", VARIANCE: "qg_variance"}


@registered
@dataclass(frozen=True)
class QuasiGlobal(History, Over):
    """Momentum from the realised movement.

    Attributes:
        mu: μ or β1.
        beta2: of Adam.
    """

    name: ClassVar[str] = "quasi_global"

    mu: float = 0.9
    beta2: float = 0.999

    @property
    def writes(self) -> tuple[str, ...]:
        """The hooks set the optimizer's buffers."""
        return (*self.inner.writes, *self.history)

    @property
    def replicas(self) -> tuple[str, ...]:
        """The weights before the step, and the tracked buffers."""
        return (*self.inner.replicas, START, *(TRACKED[slot] for slot in self.history))

    @property
    def hooks(self) -> tuple[str, ...]:
        """Around the step and the exchange."""
        return tuple(dict.fromkeys((*self.inner.hooks, "before_step", "end_step")))

    @property
    def needs_rate(self) -> bool:
        """SGD's movement is divided by it."""
        return True

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``; the base must exchange weights."""
        require_weights(self, self.inner)
        return super().start(nodes, segments, seed)

    def before_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """Remember x; give the optimizer m̂ (and v̂)."""
        for part in parts:
            part[START][...] = part[WEIGHTS]
            for slot in self.history:
                part[slot][...] = part[TRACKED[slot]]
        if "before_step" in self.inner.hooks:
            super().before_step(state, number, parts)

    def end_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """Follow x − x⁺."""
        if "end_step" in self.inner.hooks:
            super().end_step(state, number, parts)
        moved = [_moved(part) for part in parts]
        if VARIANCE in self.history:
            self._follow_direction(parts, moved)
            return
        for part, movement in zip(parts, moved, strict=True):
            rate = part[RATE]
            np.divide(movement, rate, out=movement, where=rate > 0)
            _track(part[TRACKED[MOMENTUM]], movement, self.mu)

    def _follow_direction(self, parts: Sequence[Slots], moved: Sequence[Array]) -> None:
        norm = float(sum(np.sum(np.square(m, dtype=np.float64)) for m in moved)) ** 0.5
        for part, movement in zip(parts, moved, strict=True):
            if norm:
                movement /= movement.dtype.type(norm)
            _track(part[TRACKED[MOMENTUM]], movement, self.mu)
            _track(part[TRACKED[VARIANCE]], np.square(movement), self.beta2)


def _moved(part: Slots) -> Array:
    """The values of x − x⁺."""
    now = part[WEIGHTS]
    difference: Array = np.subtract(part[START], now, dtype=accumulator(now.dtype))
    return difference


def _track(tracked: Array, value: Array, keep: float) -> None:
    """Let ``tracked`` move to keep · tracked + (1 − keep) · value."""
    kind = value.dtype.type
    tracked[...] = kind(keep) * tracked + kind(1.0 - keep) * value
