"""Your own topology: from a graph, a mixing matrix, several in turn, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gossip_hvd.errors import ConfigError
from gossip_hvd.topology.contract import (
    Edges,
    Matrix,
    Meeting,
    Segments,
    Stochastic,
    Topology,
    require_stochastic,
)

if TYPE_CHECKING:
    import networkx

Rows: TypeAlias = tuple[tuple[float, ...], ...]
Source: TypeAlias = "int | Sequence[int] | None"
Rule: TypeAlias = "Callable[[int, int, int, int], Matrix | Sequence[Source]]"


@dataclass(frozen=True)
class Custom(Topology):
    """Mixing by given matrices in turn (round t uses t modulo their number) or by a function.

    Make one with `from_graph`, `from_matrix`, `from_matrices` or `from_function`. Every matrix
    is checked against `stochastic` before it is used.

    Attributes:
        rule: the matrices as tuples of rows, or a pure function of (n, seed, round, segment).
        stochastic: what the matrices must be.
    """

    rule: tuple[Rows, ...] | Rule
    stochastic: Stochastic = "doubly"

    def __repr__(self) -> str:
        """Sizes in place of the numbers."""
        if callable(self.rule):
            name = getattr(self.rule, "__qualname__", repr(self.rule))
            return f"Custom({name}, {self.stochastic!r})"
        size = len(self.rule[0])
        return f"Custom({len(self.rule)} of {size}x{size}, {self.stochastic!r})"

    def __hash__(self) -> int:
        """Of a row in place of all n²: it is asked for whenever a round is planned."""
        rule = self.rule if callable(self.rule) else (len(self.rule), self.rule[0][0])
        return hash((rule, self.stochastic))

    @classmethod
    def from_graph(cls, graph: networkx.Graph[Any]) -> Custom:
        """An undirected networkx graph, Metropolis-Hastings weights, nodes in the graph's order.

        w_ij = 1 / (1 + max(degree_i, degree_j)), self-loops not counted: doubly stochastic for
        every graph (Xiao, Boyd, Lall, IPSN 2005).

        Raises:
            ConfigError: the graph is directed or not connected.
        """
        import networkx

        if graph.is_directed():
            raise ConfigError("Custom.from_graph: the graph is directed; give a matrix instead")
        if graph.number_of_nodes() == 0 or not networkx.is_connected(graph):
            raise ConfigError("Custom.from_graph: not connected; its parts would never agree")
        links: Matrix = networkx.to_numpy_array(graph, weight=None).astype(bool).astype(float)
        np.fill_diagonal(links, 0.0)
        degrees = links.sum(axis=1)
        w = links / (1.0 + np.maximum(degrees[:, None], degrees[None, :]))
        np.fill_diagonal(w, 1.0 - w.sum(axis=1))
        return cls.from_matrix(w)

    @classmethod
    def from_matrix(cls, w: npt.ArrayLike, stochastic: Stochastic = "doubly") -> Custom:
        """One matrix (n, n) for every round: x_i <- sum_j w[i, j] x_j; see `from_matrices`."""
        return cls.from_matrices((w,), stochastic)

    @classmethod
    def from_matrices(
        cls, matrices: Iterable[npt.ArrayLike], stochastic: Stochastic = "doubly"
    ) -> Custom:
        """Several matrices (n, n), one a round in turn.

        Raises:
            ConfigError: none given, not square, of different sizes, or not as declared; names
                the row or column.
        """
        tables: list[Rows] = []
        for place, w in enumerate(matrices):
            matrix = _square(w, f"Custom: matrix {place}")
            require_stochastic(matrix, stochastic, f"Custom: matrix {place}")
            tables.append(tuple(tuple(row) for row in matrix.tolist()))
        if len({len(rows) for rows in tables}) != 1:
            sizes = [len(rows) for rows in tables]
            raise ConfigError(f"Custom: one or more matrices of one size expected, got {sizes}")
        return cls(tuple(tables), stochastic)

    @classmethod
    def from_function(cls, rule: Rule, stochastic: Stochastic = "doubly") -> Custom:
        """A function of (n, seed, round, segment) that gives W or whom each node receives from.

        The function must give the same on every node: draw with `gossip_hvd.draws`, not from a
        stream. It returns a numpy matrix (n, n), or a sequence of n entries: node i receives
        from the node (or the k nodes) entry i names, with weight 1/2 (1/(k+1)); None rests.
        """
        return cls(rule, stochastic)

    def _refusal(self, n: int) -> str | None:
        if callable(self.rule) or len(self.rule[0]) == n:
            return None
        return f"the matrix is for {len(self.rule[0])} nodes, but {n} take part"

    def _plan(self, me: int, n: int, seed: int, round: int, segments: Segments) -> list[Meeting]:
        if callable(self.rule):
            return [_called(self, n, seed, round, segment)[me] for segment in segments]
        return [self._tables[round % len(self.rule)][me]] * len(segments)

    @cached_property
    def _tables(self) -> list[list[Meeting]]:
        """All nodes' meetings by each given matrix."""
        return [] if callable(self.rule) else [_meetings(np.array(rows)) for rows in self.rule]

    def _period(self, n: int) -> int | None:
        return None if callable(self.rule) else len(self.rule)


@lru_cache(maxsize=64)
def _called(topology: Custom, n: int, seed: int, round: int, segment: int) -> list[Meeting]:
    """All nodes' meetings by the user's function, checked."""
    assert callable(topology.rule)
    where = f"{topology}, round {round}, segment {segment}"
    answer = topology.rule(n, seed, round, segment)
    dense = isinstance(answer, np.ndarray) and answer.ndim == 2
    w = _square(answer, where) if dense else _from_sources(answer, n, where)
    if len(w) != n:
        raise ConfigError(f"{where}: {n} nodes expected, got {len(w)}")
    require_stochastic(w, topology.stochastic, where)
    return _meetings(w)


def _meetings(w: Matrix) -> list[Meeting]:
    def edges(line: Matrix, me: int) -> Edges:
        return tuple((j, float(line[j])) for j in np.flatnonzero(line).tolist() if j != me)

    return [Meeting(edges(w[me], me), edges(w[:, me], me)) for me in range(len(w))]


def _square(w: object, where: str) -> Matrix:
    try:
        matrix = np.array(w, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: expected a square matrix of numbers: {error}") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ConfigError(f"{where}: expected a square matrix, got shape {matrix.shape}")
    return matrix


def _from_sources(answer: Any, n: int, where: str) -> Matrix:
    if len(answer) != n:
        raise ConfigError(f"{where}: sources for {n} nodes expected, got {len(answer)}")
    w = np.zeros((n, n))
    for me, named in enumerate(answer):
        peers = [] if named is None else list(named) if np.ndim(named) else [named]
        for peer in peers:
            if not 0 <= int(peer) < n or int(peer) == me:
                raise ConfigError(f"{where}: node {me} cannot receive from node {peer}")
            w[me, int(peer)] += 1.0 / (len(peers) + 1)
        w[me, me] = 1.0 / (len(peers) + 1)
    return w
