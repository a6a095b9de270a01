"""What a topology promises: each node's row and column of the mixing matrix, for any round.

A topology is a pure rule W(n, seed, round, segment). A node needs only its own row (whom it
receives from, with which weight) and its own column (whom it sends to), so that is what `plan`
gives; the matrix is derived from these meetings and never stored.

Symbols: n nodes, W mixing matrix, w_ij the weight with which node i takes node j's values:
x_i <- w_ii x_i + sum_j w_ij x_j.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gossip_hvd.errors import ConfigError

Stochastic: TypeAlias = Literal["doubly", "column", "row"]
Edges: TypeAlias = tuple[tuple[int, float], ...]
Segments: TypeAlias = range | tuple[int, ...]
Matrix: TypeAlias = npt.NDArray[np.float64]

TOLERANCE = 1e-9
"""How far a row or column of W may be from summing to one."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Whom one node meets in one round with one segment.

    Attributes:
        receives: (j, w_ij): from whom this node i receives, and the weight it gives them.
        sends: (j, w_ji): to whom this node i sends, and the weight the receiver gives it.
    """

    receives: Edges = ()
    sends: Edges = ()

    @property
    def own(self) -> float:
        """w_ii where rows sum to one: what the receive weights leave."""
        return 1.0 - math.fsum(weight for _, weight in self.receives)

    @property
    def kept(self) -> float:
        """w_ii where columns sum to one (push-sum): what the send weights leave."""
        return 1.0 - math.fsum(weight for _, weight in self.sends)


ALONE = Meeting()
"""Nobody met: the node keeps its values."""


def one_way(source: int, destination: int, weight: float = 0.5) -> Meeting:
    """Receive from one node and send to another, all with the same weight."""
    return Meeting(((source, weight),), ((destination, weight),))


def mutual(edges: Edges) -> Meeting:
    """Exchange with each of these peers: the column equals the row."""
    return Meeting(edges, edges)


def circulant(me: int, n: int, taps: Iterable[tuple[int, float]]) -> Meeting:
    """One row and column of W = sum_o w_o P^o, P the shift by one: receive from me - o.

    Offsets that agree modulo n are one peer with the sum of their weights; an offset of 0 modulo
    n stays in the node's own weight.
    """
    merged: dict[int, float] = {}
    for offset, weight in taps:
        if offset % n:
            merged[offset % n] = merged.get(offset % n, 0.0) + weight
    return Meeting(
        tuple(((me - offset) % n, weight) for offset, weight in merged.items()),
        tuple(((me + offset) % n, weight) for offset, weight in merged.items()),
    )


class Topology(ABC):
    """Who meets whom, as a pure function of (n, seed, round, segment).

    Subclasses are frozen dataclasses of plain options: printable, comparable, without state.
    They give `_plan`, and where they can `_period`, `_exact_after` and `_refusal`; `n` is 2 or
    more in all of these, since one node meets nobody in any topology.
    """

    stochastic: Stochastic = "doubly"
    """Which sums of W are one: both, columns only (push-sum), or rows only."""

    def plan(
        self, me: int, n: int, seed: int, round: int, segments: int | Sequence[int]
    ) -> list[Meeting]:
        """This node's meetings, one for each segment.

        Args:
            me: this node, 0 .. n-1.
            n: how many nodes gossip.
            seed: the same on every node.
            round: which round, 0 or more; any order, any gaps.
            segments: the segments' numbers, or how many (then 0 .. segments-1).

        Raises:
            ConfigError: `me` is no node, or this topology does not exist for `n` nodes.
        """
        listed: Segments
        if isinstance(segments, int):
            listed = range(segments)
        else:
            listed = segments if isinstance(segments, range) else tuple(segments)
        if not 0 <= me < n or round < 0:
            raise ConfigError(
                f"{self}: cannot plan round {round} of node {me} among {n} node(s);"
                " expected round >= 0 and 0 <= node < nodes"
            )
        if n == 1:
            return [ALONE] * len(listed)
        self.require(n)
        return self._plan(me, n, seed, round, listed)

    def peers(self, me: int, n: int, seed: int, round: int, segment: int = 0) -> Meeting:
        """This node's meeting in one round with one segment; see `plan`."""
        return self.plan(me, n, seed, round, (segment,))[0]

    def require(self, n: int) -> None:
        """Raise ConfigError where this topology does not exist for `n` nodes."""
        reason = self._refusal(n) if n > 1 else None
        if reason is not None:
            raise ConfigError(f"{self}: {reason}")

    def period(self, n: int) -> int | None:
        """After how many rounds the schedule repeats, or None for random draws."""
        self.require(n)
        return 1 if n == 1 else self._period(n)

    def exact_after(self, n: int) -> int | None:
        """After how many rounds, from a multiple of the period, W..W is exactly 11^T/n.

        None where no finite number of rounds is claimed.
        """
        self.require(n)
        return 0 if n == 1 else self._exact_after(n)

    def own_weight(self, meeting: Meeting) -> float:
        """w_ii of a meeting: what is left in the row, or in the column for push-sum."""
        return meeting.kept if self.stochastic == "column" else meeting.own

    def matrix(self, n: int, seed: int = 0, round: int = 0, segment: int = 0) -> Matrix:
        """W, shape (n, n), from every node's receives; for tests, simulations and plots."""
        return self._matrices(n, seed, round, segment)[0]

    def check(self, n: int, seed: int = 0, rounds: int | None = None, segments: int = 1) -> None:
        """Raise ConfigError, naming row or column, unless W is as `stochastic` declares.

        Args:
            n: how many nodes.
            seed: the seed of random topologies.
            rounds: how many rounds to look at; by default one period, or 4 random rounds.
            segments: how many segments to look at.
        """
        for round in range(rounds or self.period(n) or 4):
            for segment in range(segments):
                taken, given = self._matrices(n, seed, round, segment)
                where = f"{self}, {n} nodes, round {round}, segment {segment}"
                if not np.array_equal(taken, given):
                    i, j = (int(k) for k in np.argwhere(taken != given)[0])
                    raise ConfigError(
                        f"{where}: node {i} receives from node {j} with weight {taken[i, j]},"
                        f" but node {j} sends to it with weight {given[i, j]}; both must agree"
                    )
                require_stochastic(taken, self.stochastic, where)

    def _matrices(self, n: int, seed: int, round: int, segment: int) -> tuple[Matrix, Matrix]:
        """W from the receives, and W from the sends."""
        taken, given = np.zeros((n, n)), np.zeros((n, n))
        for me in range(n):
            meeting = self.peers(me, n, seed, round, segment)
            for peer, weight in meeting.receives:
                taken[me, peer] += weight
            for peer, weight in meeting.sends:
                given[peer, me] += weight
            taken[me, me] = given[me, me] = self.own_weight(meeting)
        return taken, given

    @abstractmethod
    def _plan(
        self, me: int, n: int, seed: int, round: int, segments: Segments
    ) -> list[Meeting]: ...

    def _refusal(self, n: int) -> str | None:
        """Why this topology does not exist for `n` nodes, and what to do; None where it does."""
        return None

    def _period(self, n: int) -> int | None:
        return None

    def _exact_after(self, n: int) -> int | None:
        return None


class Periodic(Topology):
    """A topology without draws: a cyclic schedule, the same for every seed and segment.

    A subclass may offer the option `stagger`: segment s is then s rounds ahead of segment 0, so
    a node meets different peers with different segments of one round.
    """

    stagger: bool = False

    @abstractmethod
    def _at(self, me: int, n: int, place: int) -> Meeting:
        """The meeting at this place of the period."""

    @abstractmethod
    def _period(self, n: int) -> int: ...

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        period = self._period(n)
        if not self.stagger:
            return [self._at(me, n, round % period)] * len(segments)
        places = [(round + segment) % period for segment in segments]
        meetings = {place: self._at(me, n, place) for place in set(places)}
        return [meetings[place] for place in places]


def require_stochastic(w: Matrix, declared: Stochastic, where: str) -> None:
    """Raise ConfigError, naming the first bad row or column, unless W is as declared."""
    if not np.isfinite(w).all() or w.min() < -TOLERANCE:
        i, j = (int(k) for k in np.argwhere(~(w >= -TOLERANCE) | ~np.isfinite(w))[0])
        raise ConfigError(f"{where}: row {i}, column {j} of W is {w[i, j]}; weights are >= 0")
    for axis, name in ((1, "row"), (0, "column")):
        sums = w.sum(axis=axis)
        wrong = np.flatnonzero(np.abs(sums - 1.0) > TOLERANCE)
        if wrong.size and declared in ("doubly", name):
            raise ConfigError(
                f"{where}: {name} {wrong[0]} of W sums to {sums[wrong[0]]:.12g}, expected 1;"
                f" {declared}-stochastic was declared: change the weights or the declaration"
            )


def log2_ceiling(n: int) -> int:
    """ceil(log2 n) for n >= 1."""
    return (n - 1).bit_length()


def digits_needed(n: int, base: int) -> int:
    """How many digits in this base name n different things: ceil(log_base n), at least 1."""
    digits, reach = 1, base
    while reach < n:
        digits, reach = digits + 1, reach * base
    return digits
