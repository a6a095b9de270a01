"""What one node sends and receives in one round, as plain data.

A method plans in terms of nodes and *units* (segments of the model, or equal parts of it); the
engine lowers each transfer to messages between ranks (see ``flight.py``). Nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

WEIGHTS = "weights"
"""The payload slot of the model's parameters."""

GRADIENTS = "gradients"
"""The payload slot of the gradients, averaged over the node."""

MOMENTUM = "momentum"
"""The payload slot of the optimizer's momentum buffers."""

VARIANCE = "variance"
"""The payload slot of a second history, such as Adam's mean square gradient."""

SHARED_SLOTS = (WEIGHTS, GRADIENTS, MOMENTUM, VARIANCE)
"""The slots that travel, which every rank of a node holds whole."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One unit of one payload slot that goes to, or comes from, one peer node.

    Attributes:
        peer: the node at the other end.
        unit: index of the unit in the stage's grid.
        weight: for a receive, the peer's weight w_ij in the mix; for a send, the weight with
            which the peer will take it (equal to a receive's for doubly stochastic mixing).
        slot: the payload slot.
    """

    peer: int
    unit: int
    weight: float = 0.5
    slot: str = WEIGHTS


@dataclass(frozen=True, slots=True)
class Stage:
    """Transfers that may all be under way at once.

    Attributes:
        sends: what this node sends.
        receives: what this node receives, in the order in which it is mixed.
        grid: how units cut the model: ``"segments"`` (the model's segments) or ``"parts"``
            (as many equal parts as there are nodes, part j owned by node j).
        rule: the arithmetic of an arrival: ``"mix"`` with the transfers' weights, ``"mean"`` of
            own and all received, ``"copy"`` of the one received, or one of a method's own.
    """

    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    grid: str = "segments"
    rule: str = "mix"


@dataclass(frozen=True, slots=True)
class Round:
    """All stages of one round, in order; a round without stages exchanges nothing.

    Attributes:
        number: the round's number, counted from 0 over completed gradient reductions.
        stages: run one after the other.
        blocking: True where the round may not overlap with compute (exact averages).
    """

    number: int
    stages: tuple[Stage, ...] = ()
    blocking: bool = False


def damped(round_: Round, factor: float) -> Round:
    """The same round with the weights of its mixing times ``factor``; exact averages stay exact.

    W becomes (1 − f) I + f W, whose sums are what they were.
    """
    if factor == 1.0:
        return round_

    def scaled(transfers: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
        return tuple(replace(t, weight=factor * t.weight) for t in transfers)

    stages = (
        replace(s, sends=scaled(s.sends), receives=scaled(s.receives)) if s.rule == "mix" else s
        for s in round_.stages
    )
    return replace(round_, stages=tuple(stages))


def exact_mean(number: int, me: int, nodes: int, slot: str = WEIGHTS) -> Round:
    """The round after which every node holds the mean over all nodes, the same bits everywhere.

    Each node reduces one part of the model and sends the result to all: 2M(n−1)/n bytes a node,
    as a ring all-reduce, in two stages instead of 2(n−1).
    """
    return Round(number, _mean_stages(me, nodes, slot) if nodes > 1 else (), blocking=True)


@lru_cache(maxsize=16)
def _mean_stages(me: int, nodes: int, slot: str) -> tuple[Stage, Stage]:
    """To the parts' owners for summing, and from them; the same in every round."""
    others = [node for node in range(nodes) if node != me]
    w = 1.0 / nodes
    to_owner = tuple(Transfer(j, j, w, slot) for j in others)
    mine_in = tuple(Transfer(j, me, w, slot) for j in others)
    mine_out = tuple(Transfer(j, me, 1.0, slot) for j in others)
    from_owner = tuple(Transfer(j, j, 1.0, slot) for j in others)
    return (
        Stage(to_owner, mine_in, "parts", "mean"),
        Stage(mine_out, from_owner, "parts", "copy"),
    )
