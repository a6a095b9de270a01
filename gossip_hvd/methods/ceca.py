"""DSGD-CECA: the exact average of any n after ⌈log2 n⌉ one-peer rounds, from two copies.

Round k of a sweep has the k-th bit d of n − 1, most significant first, and m, the number that
the bits before it make. Node i sends x if d = 1 and x̂ if d = 0 to i + m + d, receives c, and

    d = 1:  x ← ½ x + ½ c                          x̂ ← m/(2m+1) x̂ + (m+1)/(2m+1) c
    d = 0:  x ← (m+1)/(2m+1) x + m/(2m+1) c        x̂ ← ½ x̂ + ½ c

The local step moves both copies alike. So what is kept is not x̂ but e = x̂ − x, which a local
step leaves alone; with Δ = c − (what this node sent) the rules become, for weights b of x, b̂ of x̂,

    d = 1:  x ← x + b Δ          e ← (1 − b̂) e + (b̂ − b) Δ
    d = 0:  x ← x + b (Δ + e)    e ← (1 − b) e + (b̂ − b) Δ

which is also the difference form that late and rounded messages need.

| paper | here |
|---|---|
| x̂ | weights + array ``"others"`` (e) |
| n_ex, τ-th bit of n − 1 | ``Ceca.peers(...).m``, ``.d`` |
| 2-port, 1-port | ``ports=2`` (any n), ``ports=1`` (mutual, even n) |

Cost: M bytes and one message a segment, a node and a round; memory one model a node more.

Differs from the paper: the gradient is always taken at x (theirs at x̂ where d = 0), so that a
model has one set of weights to evaluate and to save.

Reference: Ding, Jin, Ying, Yuan, Yin, "DSGD-CECA: Decentralized SGD with
communication-optimal exact consensus algorithm", ICML 2023 (arXiv 2306.00256).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gossip_hvd.methods.contract import Arrival, Method, Slots, State
from gossip_hvd.methods.registry import registered
from gossip_hvd.mixing import Array, accumulator
from gossip_hvd.rounds import WEIGHTS, Round, Stage, Transfer
from gossip_hvd.topology import Ceca as Schedule

OTHERS = "others"


@registered
@dataclass(frozen=True)
class Ceca(Method):
    """Two copies, exact consensus every ⌈log2 n⌉ rounds for any number of nodes.

    Attributes:
        ports: 2 sends to one node and receives from another; 1 exchanges with one, even n only.
    """

    name: ClassVar[str] = "ceca"

    ports: int = 2

    @property
    def arrays(self) -> tuple[str, ...]:
        """The other copy, as its difference from the weights."""
        return (OTHERS,)

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``; one port needs an even number of nodes."""
        Schedule(self.ports).require(nodes)
        return super().start(nodes, segments, seed)

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``; the transfers' weight is that of x."""
        meeting = Schedule(self.ports).peers(me, state.nodes, number)
        if meeting.source is None or meeting.destination is None:
            return Round(number)
        b, units = meeting.x_weights[1], range(state.segments)
        sends = tuple(Transfer(meeting.destination, unit, b) for unit in units)
        receives = tuple(Transfer(meeting.source, unit, b) for unit in units)
        return Round(number, (Stage(sends, receives),))

    def message(
        self, state: State, number: int, slot: str, unit: int, slots: Slots
    ) -> Array | None:
        """The values of x where the bit is 1, of x̂ where it is 0."""
        d = Schedule(self.ports).peers(0, state.nodes, number).d
        return None if d or slot != WEIGHTS else slots[WEIGHTS] + slots[OTHERS]

    def apply(self, state: State, arrival: Arrival, slots: Slots) -> None:
        """The two rules above; an exact average makes the two copies equal."""
        if arrival.slot != WEIGHTS or arrival.stage.rule != "mix":
            super().apply(state, arrival, slots)
            if arrival.slot == WEIGHTS:
                slots[OTHERS][...] = 0
            return
        x, e = slots[WEIGHTS], slots[OTHERS]
        meeting = Schedule(self.ports).peers(0, state.nodes, arrival.number)
        wide = accumulator(x.dtype).type
        b, b_hat = wide(meeting.x_weights[1]), wide(meeting.others_weights[1])
        delta = np.subtract(arrival.received[0], arrival.sent, dtype=wide)
        if meeting.d:
            x += (b * delta).astype(x.dtype)
            e[...] = (1 - b_hat) * e + (b_hat - b) * delta
        else:
            x += (b * (delta + e)).astype(x.dtype)
            e[...] = (1 - b) * e + (b_hat - b) * delta
