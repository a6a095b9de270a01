"""Gossip-PGA and Gossip-AGA: gossip, and from time to time the exact average of all nodes.

    y_i = x_i − γ d_i
    x_i ← (1/n) Σ_j y_j     in every H-th round
    x_i ← Σ_j W_ij y_j      otherwise

AGA changes H where it averages. With F the loss there, averaged over nodes, ℓ the round,

    ℓ < warm-up:  F₀ ← ½ (F₀ + F)  (first: F₀ ← F)
    else:         H ← ⌈ (F₀ / F)^p · H₀ ⌉, at least 1, at most H_max

so that averages are frequent while the loss is high and rare when it has fallen.

| paper | here |
|---|---|
| W | ``base``: gossip, crossover, any other; ``"none"`` makes it local SGD |
| H | ``period``; ``math.inf`` never averages |
| H_init, K_warmup | ``initial``, ``warm_up`` |
| F_init, C | ``AdaptiveState.initial_loss``, ``.since`` |

Cost: that of the base in H − 1 of H rounds, and 2M(n−1)/n bytes in one, on the critical path.

Differs from the papers: the average is summed in double precision and has the same bits on every
node. AGA's formula is quoted from memory: nobody here could read the paper's Algorithm 2, and no
public implementation was found. It is one small function, ``adapted_period``, which ``rule``
replaces; exponent p, H_max and the first value of F₀ (there 0) are ours.

Reference: Chen, Yuan, Zhang, Pan, Xu, Yin, "Accelerating gossip SGD with periodic global
averaging", ICML 2021 (arXiv 2105.09080).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods.contract import Context, State
from gossip_hvd.methods.over import Over, OverState, of_base, with_base
from gossip_hvd.methods.registry import registered
from gossip_hvd.mixing import Array
from gossip_hvd.rounds import Round, exact_mean


@dataclass(frozen=True)
class Averaging(Over):
    """What all methods with exact averages share: when they are due, and what follows."""

    def due(self, state: State, number: int) -> bool:
        """Whether round ``number`` is an exact average."""
        raise NotImplementedError

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        if self.due(state, number):
            return exact_mean(number, me, state.nodes)
        return super().plan(state, number, me)

    def finish(
        self, state: State, done: Round, own_note: Array, notes: Mapping[int, Array]
    ) -> State:
        """See ``Method.finish``."""
        if self.due(state, done.number):
            return with_base(state, self.inner.levelled(of_base(state)))
        return super().finish(state, done, own_note, notes)


@registered
@dataclass(frozen=True)
class GossipPGA(Averaging):
    """The exact average in every ``period``-th round.

    Attributes:
        period: H; 1 averages always, ``math.inf`` never.
    """

    name: ClassVar[str] = "gossip_pga"

    period: float = 6

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``."""
        require_period(self, self.period)
        return super().start(nodes, segments, seed)

    def due(self, state: State, number: int) -> bool:
        """mod(k + 1, H) = 0."""
        return (number + 1) % self.period == 0


def require_period(method: Over, period: float) -> None:
    """Refuse a period that is no number of rounds."""
    if period < 1 or (period != math.inf and period != int(period)):
        raise ConfigError(f"{method}: the period is a whole number of rounds, or math.inf.")


# Gossip-AGA ------------------------------------------------------------------------------------


def adapted_period(
    initial_loss: float, loss: float, initial: int, exponent: float, longest: int
) -> int:
    """⌈ (F₀ / F)^p · H₀ ⌉ between 1 and H_max: AGA's rule as remembered (see above)."""
    if not loss > 0 or not math.isfinite(initial_loss / loss):
        return initial
    period = math.ceil(math.pow(initial_loss / loss, exponent) * initial)
    return max(1, min(longest, period))


Rule = Callable[[float, float, int, float, int], int]


@dataclass(frozen=True)
class AdaptiveState(OverState):
    """AGA's numbers.

    Attributes:
        period: H.
        since: rounds since the last average.
        initial_loss: F₀; 0 before the first average.
    """

    period: int
    since: int = 0
    initial_loss: float = 0.0


@registered
@dataclass(frozen=True)
class GossipAGA(Averaging):
    """The exact average at intervals that grow as the loss falls.

    Attributes:
        initial: H₀, the first period.
        warm_up: rounds in which the initial loss is estimated and the period stays.
        exponent: of the losses' ratio.
        longest: H_max.
        rule: (F₀, F, H₀, p, H_max) → H.
    """

    name: ClassVar[str] = "gossip_aga"

    initial: int = 4
    warm_up: int = 100
    exponent: float = 1.0
    longest: int = 64
    rule: Rule = field(default=adapted_period, repr=False)

    @property
    def linear(self) -> bool:
        """The next period depends on the losses that a round brings."""
        return False

    @property
    def needs_loss(self) -> bool:
        """The rule compares losses."""
        return True

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``."""
        require_period(self, self.initial)
        require_period(self, self.longest)
        base = self.inner.start(nodes, segments, seed)
        return AdaptiveState(nodes, segments, seed, base, self.initial)

    def due(self, state: State, number: int) -> bool:
        """C ≥ H."""
        assert isinstance(state, AdaptiveState)
        return state.since + 1 >= state.period

    def note(self, state: State, number: int, context: Context) -> Sequence[float]:
        """The loss travels with the exact average only, behind the base's numbers."""
        base = super().note(state, number, context)
        if not self.due(state, number):
            return base
        return (*base, math.nan if context.loss is None else context.loss)

    def finish(
        self, state: State, done: Round, own_note: Array, notes: Mapping[int, Array]
    ) -> State:
        """See ``Method.finish``; a node without a loss, a NaN, is left out of their mean."""
        assert isinstance(state, AdaptiveState)
        after = super().finish(state, done, own_note, notes)
        assert isinstance(after, AdaptiveState)
        if not self.due(state, done.number):
            return replace(after, since=state.since + 1)
        losses = [n[-1] for n in (own_note, *notes.values()) if not math.isnan(n[-1])]
        if not losses:
            return replace(after, since=0)
        # fsum does not depend on the order, which differs from node to node.
        loss = math.fsum(losses) / len(losses)
        first = state.initial_loss
        if done.number < self.warm_up or not first:
            first = (first + loss) / 2 if first else loss
            return replace(after, since=0, initial_loss=first)
        period = self.rule(first, loss, self.initial, self.exponent, self.longest)
        return replace(after, since=0, period=period)
