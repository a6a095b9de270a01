"""Stochastic gradient push: gossip over directed graphs of any shape, made unbiased by a mass.

    x_i ← x_i − γ d_i(z_i)
    x_i ← Σ_j p_ij x_j ,   w_i ← Σ_j p_ij w_j ,   z_i = x_i / w_i            (w_i = 1 at the start)

P needs column sums of one only: a node says what it gives, not what it gets. The model holds z,
and z travels; its mass goes with it as the note. In these terms, with s_ij = p_ij w_j the mass
that j gives to i, the second line reads

    w_i⁺ = w_i − Σ_j s_ji + Σ_j s_ij ,   z_i⁺ = (1/w_i⁺) [ (w_i − Σ_j s_ji) z_i + Σ_j s_ij z_j ]

| paper | here |
|---|---|
| x_i, the biased weights | w_i · weights; the slot holds them only during the local step |
| z_i | slot ``"weights"`` |
| w_i, ps-weight | ``PushSumState.mass`` |
| p_ij | ``topology``'s columns |
| τ of overlap SGP | ``timing="awc"``, ``staleness=τ − 1``: one exchange at a time |

Cost: M bytes and one message a segment, a node and a peer, and one small note.

Σ w_i = n holds exactly, for ever: masses are multiples of 2⁻⁴⁰, given shares are rounded down to
one, and what is not given is kept. What is under way counts with its sender until it has been
merged on both sides, so a drained engine's checkpoint has all of it.

Differs from the authors' code: all segments share one graph a round, as there, but they go in
separate messages; on regular graphs the mass travels although it stays 1; no process or thread
holds a second copy of the model. Under overlap a local step is divided by the mass at its own time.

Reference: Assran, Loizou, Ballas, Rabbat, "Stochastic gradient push for distributed deep
learning", ICML 2019 (arXiv 1811.10792).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from gossip_hvd.methods.contract import Arrival, Context, Slots, State
from gossip_hvd.methods.gossip import OverGraph, mixing_round
from gossip_hvd.methods.registry import registered
from gossip_hvd.mixing import Array, accumulator, combine, mean
from gossip_hvd.rounds import WEIGHTS, Round
from gossip_hvd.topology import Topology

GRAIN = 2.0**40
"""Masses are multiples of 1 / GRAIN; sums of them up to 2¹³ nodes are exact in double precision."""


def given(weight: float, mass: float) -> float:
    """The mass that a node of ``mass`` gives with this weight, the same number at both ends."""
    return math.floor(weight * mass * GRAIN) / GRAIN


@dataclass(frozen=True)
class PushSumState(State):
    """SGP's number.

    Attributes:
        mass: w of this node.
    """

    mass: float = 1.0


@registered
@dataclass(frozen=True)
class SGP(OverGraph):
    """Push-sum gossip.

    Attributes:
        topology: column- or doubly stochastic.
    """

    name: ClassVar[str] = "sgp"

    topology: str | Topology = "directed_exponential"

    allowed: ClassVar[tuple[str, ...]] = ("doubly", "column")

    @property
    def hooks(self) -> tuple[str, ...]:
        """The local step moves x, not z."""
        return ("before_step", "after_step")

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``."""
        super().start(nodes, segments, seed)
        return PushSumState(nodes, segments, seed)

    def before_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """x = w z."""
        _scale(parts, _mass(state))

    def after_step(self, state: State, number: int, parts: Sequence[Slots]) -> None:
        """z = x / w."""
        _scale(parts, 1.0 / _mass(state))

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``; one graph for all segments, since a node has one mass."""
        return mixing_round(self.topology_at(number), state, number, me, shared=True)

    def note(self, state: State, number: int, context: Context) -> Sequence[float]:
        """The mass."""
        return (_mass(state),)

    def apply(self, state: State, arrival: Arrival, slots: Slots) -> None:
        """The rule above for z; an exact average counts every node by its mass."""
        now, mass, rule = slots[arrival.slot], float(arrival.own_note[0]), arrival.stage.rule
        masses = [float(arrival.notes[peer][0]) for peer in arrival.peers]
        if rule == "mean" and (mass != 1.0 or any(m != 1.0 for m in masses)):
            _weighted_mean([now, *arrival.received], [mass, *masses], now)
        elif rule == "mix":
            sends = {t.peer: t.weight for t in arrival.stage.sends if t.unit == arrival.unit}
            _push(arrival, now, mass, masses, sends.values())
        else:
            super().apply(state, arrival, slots)

    def finish(
        self, state: State, done: Round, own_note: Array, notes: Mapping[int, Array]
    ) -> State:
        """w ← w − what was given + what came."""
        assert isinstance(state, PushSumState)
        if not done.stages:
            return state
        stage = done.stages[0]
        kept = _kept(state.mass, {t.peer: t.weight for t in stage.sends}.values())
        came = {t.peer: given(t.weight, float(notes[t.peer][0])) for t in stage.receives}
        return replace(state, mass=kept + sum(came.values()))

    def levelled(self, state: State) -> State:
        """All weights are equal, so all masses are again."""
        assert isinstance(state, PushSumState)
        return replace(state, mass=1.0)

    def mass(self, state: State, number: int) -> float:
        """w."""
        return _mass(state)


def _mass(state: State) -> float:
    assert isinstance(state, PushSumState)
    return state.mass


def _kept(mass: float, weights: Iterable[float]) -> float:
    """What is left of a mass when shares with these weights have been given; never zero."""
    return mass - sum(given(weight, mass) for weight in weights)


def _push(
    arrival: Arrival, now: Array, mass: float, masses: Sequence[float], sends: Iterable[float]
) -> None:
    """The equation's z⁺; steps since the send count with the mass they were made with."""
    came = [given(p, m) for p, m in zip(arrival.weights, masses, strict=True)]
    after = _kept(mass, sends) + sum(came)
    if arrival.sent is not now and after != mass:
        wide = accumulator(now.dtype)
        since = np.subtract(now, arrival.sent, dtype=wide)
        now += (wide.type(mass / after - 1.0) * since).astype(now.dtype)
    combine(now, arrival.sent, arrival.received, [share / after for share in came], out=now)


def _weighted_mean(values: Sequence[Array], masses: Sequence[float], out: Array) -> None:
    """Σ w_j z_j / n, as Σ w_j = n."""
    mean([np.multiply(v, m, dtype=np.float64) for v, m in zip(values, masses, strict=True)], out)


def _scale(parts: Sequence[Slots], factor: float) -> None:
    if factor != 1.0:
        for part in parts:
            part[WEIGHTS][...] *= part[WEIGHTS].dtype.type(factor)
