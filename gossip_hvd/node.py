"""The nodes of a job: which ranks share one, and how transfers between nodes become messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gossip_hvd.errors import ConfigError


@dataclass(frozen=True)
class Cluster:
    """All nodes of the job, as every rank knows them.

    Attributes:
        nodes: the world ranks of each node, in order; together they are all ranks.
    """

    nodes: tuple[tuple[int, ...], ...]

    @classmethod
    def grouped(cls, size: int, node_size: int) -> Cluster:
        """Every ``node_size`` consecutive ranks are a node; the last may be smaller.

        Raises:
            ConfigError: where ``node_size`` is not between 1 and ``size``.
        """
        if not 1 <= node_size <= size:
            raise ConfigError(
                f"node_size={node_size}: expected 1 to {size}, the number of ranks. "
                "Start more ranks or make the virtual nodes smaller."
            )
        starts = range(0, size, node_size)
        return cls(tuple(tuple(range(a, min(a + node_size, size))) for a in starts))

    @classmethod
    def by_host(cls, hosts: Sequence[str]) -> Cluster:
        """Ranks with equal entries in ``hosts`` (one a rank) are a node."""
        found: dict[str, list[int]] = {}
        for rank, host in enumerate(hosts):
            found.setdefault(host, []).append(rank)
        return cls(tuple(tuple(ranks) for ranks in found.values()))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return sum(len(ranks) for ranks in self.nodes)

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Number of ranks of each node."""
        return tuple(len(ranks) for ranks in self.nodes)

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        return {r: (n, i) for n, ranks in enumerate(self.nodes) for i, r in enumerate(ranks)}

    def node_of(self, rank: int) -> int:
        """The node of a world rank."""
        return self._places[rank][0]

    def node_rank(self, rank: int) -> int:
        """The position of a world rank inside its node."""
        return self._places[rank][1]

    def gradient_scale(self, node: int) -> float:
        """The factor n·Lᵢ/ΣL for the mean gradient of a node of Lᵢ ranks, of n nodes.

        With it the mean over nodes follows the mean over ranks, also where nodes have different
        sizes; it is 1 where all are equal.
        """
        return len(self.nodes) * len(self.nodes[node]) / self.size
