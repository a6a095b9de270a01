"""Graphs that never change: ring, torus, grid, complete and the static exponential graph.

Every node exchanges with the same neighbours in every round. Their sweep takes one round, and
its contraction is the second largest eigenvalue of W: fine for few nodes, slow for a large ring
(1 - O(1/n^2)).

Cost a round: one message each way and the model's bytes for every neighbour.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache

from gossip_hvd.topology.contract import Edges, Meeting, Periodic, circulant, log2_ceiling, mutual


class Fixed(Periodic):
    """A graph that is the same in every round."""

    @abstractmethod
    def _meeting(self, me: int, n: int) -> Meeting: ...

    def _at(self, me: int, n: int, place: int) -> Meeting:
        return _remembered(self, me, n)

    def _period(self, n: int) -> int:
        return 1


@lru_cache(maxsize=256)
def _remembered(topology: Fixed, me: int, n: int) -> Meeting:
    return topology._meeting(me, n)


@dataclass(frozen=True)
class Ring(Fixed):
    """Both neighbours on a circle, 1/3 each; two nodes take 1/2 of each other.

    Reference: Lian et al., "Can decentralized algorithms outperform centralized algorithms?",
    NeurIPS 2017, arXiv:1705.09056 (D-PSGD).
    """

    def _meeting(self, me: int, n: int) -> Meeting:
        return mutual(_equal(me, ((me - 1) % n, (me + 1) % n)))

    def _exact_after(self, n: int) -> int | None:
        return 1 if n <= 3 else None


@dataclass(frozen=True)
class Torus(Fixed):
    """The neighbours on a two-dimensional grid that wraps around, all with equal weight.

    Attributes:
        rows: how many rows; must divide n. By default the largest divisor up to sqrt(n), which
            is 1 for prime n: a ring.
    """

    rows: int | None = None

    def _meeting(self, me: int, n: int) -> Meeting:
        rows = _rows(self.rows, n)
        columns = n // rows
        row, column = divmod(me, columns)
        around = (
            (row - 1) % rows * columns + column,
            row * columns + (column - 1) % columns,
            row * columns + (column + 1) % columns,
            (row + 1) % rows * columns + column,
        )
        return mutual(_equal(me, around))

    def _refusal(self, n: int) -> str | None:
        return _bad_rows(self.rows, n)

    def _exact_after(self, n: int) -> int | None:
        return 1 if n <= 3 else None


@dataclass(frozen=True)
class Grid(Fixed):
    """The neighbours on a two-dimensional grid with borders; Metropolis-Hastings weights.

    w_ij = 1 / (1 + max(degree_i, degree_j)).

    Attributes:
        rows: as in `Torus`; a prime n is a line.
    """

    rows: int | None = None

    def _meeting(self, me: int, n: int) -> Meeting:
        rows = _rows(self.rows, n)
        near = _on_grid(me, rows, n // rows)
        return mutual(
            tuple(
                (peer, 1.0 / (1 + max(len(near), len(_on_grid(peer, rows, n // rows)))))
                for peer in near
            )
        )

    def _refusal(self, n: int) -> str | None:
        return _bad_rows(self.rows, n)

    def _exact_after(self, n: int) -> int | None:
        return 1 if n == 2 else None


@dataclass(frozen=True)
class Complete(Fixed):
    """Everybody, 1/n each: the exact average in one round, for n - 1 models' bytes."""

    def _meeting(self, me: int, n: int) -> Meeting:
        return mutual(tuple((peer, 1.0 / n) for peer in range(n) if peer != me))

    def _exact_after(self, n: int) -> int | None:
        return 1


@dataclass(frozen=True)
class StaticExponential(Fixed):
    """Receive from the distances 1, 2, 4, ... below n, all with equal weight.

    Reference: Ying et al., "Exponential graph is provably efficient for decentralized deep
    training", NeurIPS 2021, arXiv:2110.13363, eq. (5).
    """

    def _meeting(self, me: int, n: int) -> Meeting:
        tau = log2_ceiling(n)
        return circulant(me, n, ((2**i, 1.0 / (tau + 1)) for i in range(tau)))

    def _exact_after(self, n: int) -> int | None:
        return 1 if n <= 3 else None


def _equal(me: int, nodes: tuple[int, ...]) -> Edges:
    """These nodes, each once and without `me`, with equal weights (also for `me`)."""
    others = tuple(dict.fromkeys(node for node in nodes if node != me))
    return tuple((node, 1.0 / (len(others) + 1)) for node in others)


def _on_grid(me: int, rows: int, columns: int) -> list[int]:
    row, column = divmod(me, columns)
    near = [
        me - columns if row > 0 else -1,
        me - 1 if column > 0 else -1,
        me + 1 if column < columns - 1 else -1,
        me + columns if row < rows - 1 else -1,
    ]
    return [node for node in near if node >= 0]


def _rows(rows: int | None, n: int) -> int:
    """How many rows `n` nodes have: as asked, or the largest divisor of n up to sqrt(n)."""
    return rows or next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)


def _bad_rows(rows: int | None, n: int) -> str | None:
    if rows is None or (rows > 0 and n % rows == 0):
        return None
    return f"{rows} rows do not divide {n} nodes; leave out `rows` for the squarest grid"
