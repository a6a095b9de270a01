"""One state from those of all nodes, for a job of another shape: their weighted mean.

    x̄ = Σ_i m_i x_i / n        with m_i the mass of node i: 1, but for push-sum

Every rank reads all files and adds in the same order in double precision, so all get the same
bits. Numbers and whole-number tensors are the first rank's. A rank counts 1/L of its node of L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gossip_hvd.checkpoint.folder import Reader
from gossip_hvd.checkpoint.job import Found, Tensor, parts, read
from gossip_hvd.checkpoint.trees import unflatten
from gossip_hvd.errors import CheckpointError
from gossip_hvd.mixing import dtype_of
from gossip_hvd.transport import Bytes

FLOATING = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "C128": "complex128",
}
"""The dtypes that have a mean."""


class Merge:
    """All files of a checkpoint, open; close it."""

    def __init__(self, found: Found) -> None:
        nodes = found.whole.nodes
        self._sizes = [len(ranks) for ranks in nodes]
        self._readers = [
            Reader(found.directory, found.whole.number, node) for node in range(len(nodes))
        ]
        self._ranks = [
            (node, *parts(reader.header, place))
            for node, reader in enumerate(self._readers)
            for place in range(self._sizes[node])
        ]

    def plain(self, where: Sequence[str]) -> list[Any]:
        """A part of every rank's state with None for tensors.

        Args:
            where: keys from the root, such as ``["gossip"]``.
        """
        return [unflatten(_part(t, where), len(n), lambda _: None) for _, t, n in self._ranks]

    def first(self, where: Sequence[str], make: Callable[[Tensor], Any]) -> Any:
        """A part of the first rank's state.

        Args:
            where: keys from the root.
            make: a tensor of the framework.
        """
        node, tree, names = self._ranks[0]
        reader = self._readers[node]
        return unflatten(_part(tree, where), len(names), lambda i: make(read(reader, names[i])))

    def mean(
        self, where: Sequence[str], masses: Sequence[float], make: Callable[[Tensor], Any]
    ) -> Any:
        """A part of the state, its tensors the mean over nodes.

        Args:
            where: keys from the root.
            masses: one a rank, equal in a node; over nodes, their sum is the number of nodes.
            make: a tensor of the framework.

        Raises:
            CheckpointError: where nodes have different tensors there.
        """
        every = [_tensors(_part(tree, where), names) for _, tree, names in self._ranks]
        if len({len(names) for names in every}) > 1:
            raise CheckpointError(f"the nodes' {'/'.join(where)} cannot be merged: they differ.")
        counts = [
            mass / (self._sizes[node] * len(self._sizes))
            for mass, (node, _, _) in zip(masses, self._ranks, strict=True)
        ]
        _, tree, names = self._ranks[0]
        rows = iter(zip(*every, strict=True))
        return unflatten(
            _part(tree, where), len(names), lambda _: make(self._mean(next(rows), counts))
        )

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers:
            reader.close()

    def _mean(self, names: Sequence[str], counts: Sequence[float]) -> Tensor:
        """The mean of one tensor over all ranks; what a node wrote once is read once."""
        total: dict[tuple[int, str], float] = {}
        for (node, _, _), name, count in zip(self._ranks, names, counts, strict=True):
            total[node, name] = total.get((node, name), 0.0) + count
        kinds = {self._readers[node].header.places[name].kind for node, name in total}
        if len(kinds) > 1:
            raise CheckpointError(f"{names[0]} cannot be merged: it is {kinds} on the nodes.")
        (node, name), *_ = total
        first = read(self._readers[node], name)
        if first.kind.dtype not in FLOATING:
            return first
        dtype = dtype_of(FLOATING[first.kind.dtype])
        mean = np.zeros(first.data.nbytes // dtype.itemsize, np.result_type(dtype, np.float64))
        for (node, name), count in total.items():
            mean += count * self._values(node, name, dtype)
        return Tensor(first.kind, mean.astype(dtype).view(np.uint8))

    def _values(self, node: int, name: str, dtype: np.dtype[Any]) -> Bytes:
        return self._readers[node].read(name).view(dtype).astype(np.result_type(dtype, np.float64))


def _tensors(tree: Any, names: Sequence[str]) -> list[str]:
    """The names of a branch's tensors, in order."""
    found: list[str] = []
    unflatten(tree, len(names), lambda i: found.append(names[i]))
    return found


def _part(tree: Any, where: Sequence[str]) -> Any:
    """The branch of a tree at the end of these keys."""
    for key in where:
        pairs = tree.get("dict", ()) if isinstance(tree, dict) else ()
        found = [value for name, value in pairs if name == key]
        if len(found) != 1:
            raise CheckpointError(f"the saved state has no {key!r}.")
        tree = found[0]
    return tree
