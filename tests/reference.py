"""The academic version of every method: all replicas as rows of one matrix, X ← W X.

Dense NumPy in double precision, one short recursion a method, written from the papers. It shares
no code with the engine; only the mixing matrices come from the topologies, which have tests of
their own. An exchange is a *change* of the values it was computed from, so that the same line
serves ATC (added at once) and AWC (added one step later).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Gradient = Callable[[Matrix], Matrix]
Mixing = Callable[[int, int], Matrix]
"""W of a round and a segment."""


def mean_of(values: Matrix) -> Matrix:
    """Every row the mean of all."""
    return np.broadcast_to(values.mean(axis=0), values.shape)


@dataclass
class Dense:
    """Plain nodes that never meet.

    Attributes:
        X: weights, a row a node.
        segment_of: the segment of every column.
        rate: learning rate; may be changed between steps.
        mu: momentum of the local optimizer, v ← μ v + g ; x ← x − rate · v.
        awc: whether an exchange is merged one step late.
    """

    X: Matrix
    segment_of: Sequence[int]
    rate: float = 0.1
    mu: float = 0.0
    awc: bool = False
    losses: Sequence[float] = ()
    t: int = 0
    late: dict[str, Matrix] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.X = self.X.copy()
        self.V = np.zeros_like(self.X)
        self.n = len(self.X)

    def step(self, gradient: Gradient) -> None:
        self.local(self.reduce(gradient(self.model())))
        self.land()
        if self.n > 1:
            if self.due():
                self.average()
            elif self.awc:
                self.late = self.change()
            else:
                self.add(self.change())
        self.after()
        self.t += 1

    def land(self) -> None:
        self.add(self.late)
        self.late = {}

    def add(self, change: Mapping[str, Matrix]) -> None:
        for name, by in change.items():
            setattr(self, name, getattr(self, name) + by)

    def model(self) -> Matrix:
        """Where gradients are taken."""
        return self.X

    def reduce(self, G: Matrix) -> Matrix:
        return G

    def local(self, G: Matrix) -> None:
        self.V = self.mu * self.V + G
        self.X = self.X - self.rate * self.V

    def change(self) -> dict[str, Matrix]:
        return {}

    def due(self) -> bool:
        return False

    def average(self) -> None:
        self.X = mean_of(self.X).copy()

    def after(self) -> None:
        pass

    def mixed(self, values: Matrix, mixing: Mixing, t: int | None = None) -> Matrix:
        """W X, each segment with its own W."""
        result = values.copy()
        for s in sorted(set(self.segment_of)):
            columns = np.flatnonzero(np.asarray(self.segment_of) == s)
            result[:, columns] = mixing(self.t if t is None else t, s) @ values[:, columns]
        return result


@dataclass
class AllReduce(Dense):
    """g ← mean of all g."""

    def reduce(self, G: Matrix) -> Matrix:
        return mean_of(G)


@dataclass
class Gossip(Dense):
    """X ← W X; with ``stream`` only every so many-th segment."""

    mixing: Mixing = lambda t, s: np.eye(1)
    stream: int = 1
    slots: tuple[str, ...] = ("X",)

    def change(self) -> dict[str, Matrix]:
        return {
            name: self.mixed(getattr(self, name), self.turn) - getattr(self, name)
            for name in self.slots
        }

    def turn(self, t: int, s: int) -> Matrix:
        return (
            self.mixing(t // self.stream, s)
            if s % self.stream == t % self.stream
            else np.eye(self.n)
        )


@dataclass
class GradientGossip(Gossip):
    """g ← W g before the step."""

    def reduce(self, G: Matrix) -> Matrix:
        return self.mixed(G, self.mixing)

    def change(self) -> dict[str, Matrix]:
        return {}


@dataclass
class PGA(Gossip):
    """Gossip, and the mean in every H-th round; post-local SGD's H is 1 before ``switch``."""

    H: float = 3
    switch: int = 0

    def due(self) -> bool:
        return self.t < self.switch or (self.t - self.switch + 1) % self.H == 0

    def average(self) -> None:
        for name in self.slots:
            setattr(self, name, mean_of(getattr(self, name)).copy())


@dataclass
class AGA(PGA):
    """H grows as the loss falls."""

    initial: int = 2
    warm_up: int = 4
    longest: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.period, self.C, self.F0 = self.initial, 0, 0.0

    def due(self) -> bool:
        return self.period <= self.C + 1

    def after(self) -> None:
        if not self.due():
            self.C += 1
            return
        F = sum(self.losses) / self.n
        self.C = 0
        if self.F0 == 0:
            self.F0 = F
        elif self.t < self.warm_up:
            self.F0 = (self.F0 + F) / 2
        else:
            self.period = max(1, min(self.longest, int(np.ceil(self.F0 / F * self.initial))))


@dataclass
class Ceca(Dense):
    """Two copies with the paper's coefficients; both take the local step."""

    ports: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.Y = self.X.copy()

    def local(self, G: Matrix) -> None:
        self.V = self.mu * self.V + G
        self.X, self.Y = self.X - self.rate * self.V, self.Y - self.rate * self.V

    def change(self) -> dict[str, Matrix]:
        bits = [int(bit) for bit in bin(self.n - 1)[2:]]
        place = self.t % len(bits)
        d, m = bits[place], int("0" + "".join(map(str, bits[:place])), 2)
        sent = self.X if d else self.Y
        nodes = np.arange(self.n)
        if self.ports == 2:
            c = sent[(nodes - m - d) % self.n]
        else:
            c = sent[np.where(nodes % 2, nodes + 2 * m + 1, nodes - 2 * m - 1) % self.n]
        if d:
            x, y = (self.X + c) / 2, (m * self.Y + (m + 1) * c) / (2 * m + 1)
        else:
            x, y = ((m + 1) * self.X + m * c) / (2 * m + 1), (self.Y + c) / 2
        return {"X": x - self.X, "Y": y - self.Y}


@dataclass
class SGP(Gossip):
    """X ← P X, w ← P w, z = X / w; gradients at z."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.w = np.ones((self.n, 1))

    def model(self) -> Matrix:
        return self.X / self.w

    def change(self) -> dict[str, Matrix]:
        P = self.mixing(self.t, 0)
        return {"X": P @ self.X - self.X, "w": P @ self.w - self.w}


@dataclass
class PeriodicSGP(SGP):
    """SGP with the exact mean of the biased weights in every H-th round."""

    H: int = 3

    def due(self) -> bool:
        return (self.t + 1) % self.H == 0

    def average(self) -> None:
        self.X, self.w = mean_of(self.X).copy(), np.ones((self.n, 1))


@dataclass
class SlowMo(PGA):
    """u ← β u + (x0 − mean)/γ ; x0 ← x0 − αγu."""

    beta: float = 0.5
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.x0, self.u = self.X[0].copy(), np.zeros_like(self.X[0])

    def average(self) -> None:
        self.u = self.beta * self.u + (self.x0 - self.X.mean(axis=0)) / self.rate
        self.x0 = self.x0 - self.alpha * self.rate * self.u
        self.X = np.broadcast_to(self.x0, self.X.shape).copy()


@dataclass
class SlowMoSGP(SlowMo, SGP):
    """SlowMo over SGP: the mean is of the biased weights, whose masses begin again."""

    def average(self) -> None:
        super().average()
        self.w = np.ones((self.n, 1))


@dataclass
class QuasiGlobal(Gossip):
    """m = μ m̂ + g ; x⁺ = W(x − η m) ; m̂ ← μ m̂ + (1 − μ)(x − x⁺)/η."""

    def local(self, G: Matrix) -> None:
        self.before = self.X
        if self.n == 1:
            super().local(G)
        else:
            self.X = self.X - self.rate * (self.mu * self.V + G)

    def after(self) -> None:
        if self.n > 1:
            moved = (self.before - self.X) / self.rate
            self.V = self.mu * self.V + (1 - self.mu) * moved


@dataclass
class Adam(Gossip):
    """Adam without bias correction, its histories local or mixed."""

    beta2: float = 0.99
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.S = np.zeros_like(self.X)

    def local(self, G: Matrix) -> None:
        self.V = self.mu * self.V + (1 - self.mu) * G
        self.S = self.beta2 * self.S + (1 - self.beta2) * G**2
        self.X = self.X - self.rate * self.V / (np.sqrt(self.S) + self.epsilon)

    def add(self, change: Mapping[str, Matrix]) -> None:
        super().add(change)
        self.S = np.maximum(self.S, 0)


@dataclass
class QuasiGlobalAdam(Adam):
    """The histories follow the direction of the realised movement."""

    def local(self, G: Matrix) -> None:
        self.before, kept = self.X, (self.V, self.S)
        super().local(G)
        if self.n > 1:
            self.V, self.S = kept

    def after(self) -> None:
        if self.n > 1:
            moved = self.before - self.X
            d = moved / np.linalg.norm(moved, axis=1, keepdims=True)
            self.V = self.mu * self.V + (1 - self.mu) * d
            self.S = self.beta2 * self.S + (1 - self.beta2) * d**2


@dataclass
class DecentLaM(Gossip):
    """g̃ = (x − W(x − γ g))/γ."""

    damping: float = 0.0

    def reduce(self, G: Matrix) -> Matrix:
        if self.n == 1:
            return G
        gamma = self.rate + self.damping
        return (self.X - self.mixed(self.X - gamma * G, self.mixing)) / gamma

    def change(self) -> dict[str, Matrix]:
        return {}


@dataclass
class AdaptiveConsensus(Gossip):
    """X ← X + γ_t (W − I) X."""

    power: float = 3.0
    floor: float = 0.0
    largest: float = 0.0

    def change(self) -> dict[str, Matrix]:
        self.largest = max(self.largest, self.rate)
        factor = max(self.floor, (self.rate / self.largest) ** self.power)
        return {name: factor * by for name, by in super().change().items()}


@dataclass
class WarmUp(Gossip):
    """All-reduce before ``switch``, then gossip whose rounds count from there."""

    switch: int = 4

    def reduce(self, G: Matrix) -> Matrix:
        return mean_of(G) if self.t < self.switch else G

    def change(self) -> dict[str, Matrix]:
        if self.t < self.switch:
            return {}
        return {"X": self.mixed(self.X, self.mixing, self.t - self.switch) - self.X}
