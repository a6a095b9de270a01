"""What one rank brings to every flight: its place among the nodes, its wire, its memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from gossip_hvd.memory import Memory
from gossip_hvd.methods.contract import RATE
from gossip_hvd.mixing import Array, accumulator, dtype_of
from gossip_hvd.node import Cluster
from gossip_hvd.recorder import Recorder
from gossip_hvd.segments import LARGEST_MESSAGE, Cell, Grid, Layout, owner
from gossip_hvd.transport import Bytes, Wire
from gossip_hvd.transport.traffic import Traffic


class Arena:
    """Memory to receive into or to send from: one place a cell, kept between rounds.

    A layout that is laid again leaves every place where it is.
    """

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)
        self._sizes: dict[Hashable, int] = {}
        self._starts: dict[Hashable, int] = {}
        self._room = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._memory.nbytes)

    def lay(self, sizes: Mapping[Any, int]) -> None:
        """From now on there is a place of so many bytes for each key; memory comes when used."""
        if sizes != self._sizes:
            self._sizes = dict(sizes)
            *starts, self._room = accumulate(sizes.values(), initial=0)
            self._starts = dict(zip(sizes, starts, strict=True))

    def __getitem__(self, key: Hashable) -> Bytes:
        """The place of ``key``."""
        if self._room > self._memory.nbytes:
            self._memory = np.empty(self._room, np.uint8)
        start = self._starts[key]
        return self._memory[start : start + self._sizes[key]]


class Lane:
    """The memory of one flight, to receive into and to send from; flights in turn share one."""

    def __init__(self) -> None:
        self.incoming, self.outgoing = Arena(), Arena()

    def lay(self, incoming: Mapping[Any, int], outgoing: Mapping[Any, int]) -> None:
        """See ``Arena.lay``."""
        self.incoming.lay(incoming)
        self.outgoing.lay(outgoing)


@dataclass
class Seat:
    """What one rank brings to every flight: its place, its wire, its memory.

    Attributes:
        cluster: all nodes.
        rank: this rank, in the world.
        layout: of the flat buffer.
        wire: to the other ranks.
        memory: the flat bytes of each payload slot, whole on every rank, and the way to keep
            them in step with the framework's tensors.
        arrays: the method's own arrays, this rank's share only.
        replicas: the method's own arrays, whole on every rank of a node.
        rates: the learning rate, one for all or one a field; None where nobody said.
        wire_dtype: what float32 and float64 values are rounded to on the wire, or None.
        largest: bytes of the largest message.
        asking: what this rank may ask for at once.
        sending: what it may send at once of what others have asked for.
        nan_policy: one of ``finite.NAN_POLICIES``.
        record: ring buffer of events.
    """

    cluster: Cluster
    rank: int
    layout: Layout
    wire: Wire
    memory: Memory
    arrays: MutableMapping[str, Bytes] = field(default_factory=dict)
    wire_dtype: str | None = None
    largest: int = LARGEST_MESSAGE
    asking: Traffic = field(default_factory=Traffic)
    sending: Traffic = field(default_factory=Traffic)
    nan_policy: str = "raise"
    record: Recorder = field(default_factory=Recorder)
    replicas: MutableMapping[str, Bytes] = field(default_factory=dict)
    rates: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        sizes = self.cluster.node_sizes
        self.node = self.cluster.node_of(self.rank)
        self.index = self.cluster.node_rank(self.rank)
        self.ranks = sizes[self.node]
        self.siblings = [r for r in self.cluster.nodes[self.node] if r != self.rank]
        self.share = self.layout.share(self.ranks, self.index)
        self.lanes = [Lane()]
        self._grids = {
            "segments": self.layout.segment_grid(sizes, self.largest),
            "parts": self.layout.part_grid(len(sizes), sizes),
        }
        self._owners = {
            name: {
                ranks: [owner(cell, self.layout.nbytes, ranks) for cell in grid.cells]
                for ranks in set(sizes)
            }
            for name, grid in self._grids.items()
        }

    def grid(self, name: str) -> Grid:
        """The cells of ``"segments"`` or ``"parts"``."""
        return self._grids[name]

    def holder(self, grid: str, cell: Cell, node: int) -> int:
        """The world rank in ``node`` whose share holds ``cell``."""
        ranks = self.cluster.nodes[node]
        return ranks[self._owners[grid][len(ranks)][cell.index]]

    def cells(self, grid: str, unit: int) -> Iterable[Cell]:
        """The cells of a unit that this rank carries."""
        owners = self._owners[grid][self.ranks]
        return (c for c in self._grids[grid].by_unit[unit] if owners[c.index] == self.index)

    def views(self, cell: Cell) -> dict[str, Array]:
        """The cell's part of every slot and named array."""
        views = self._span(cell.start, cell.stop, cell.dtype)
        a, b = cell.start - self.share.start, cell.stop - self.share.start
        dtype = dtype_of(cell.dtype)
        views.update((k, m[a:b].view(dtype)) for k, m in self.arrays.items())
        return views

    def share_views(self) -> list[dict[str, Array]]:
        """This rank's share of every slot and named array, in one part a dtype."""
        spans = [
            (max(start, self.share.start), min(stop, self.share.stop), dtype)
            for start, stop, dtype in self.layout.runs
        ]
        return [self.views(Cell(-1, -1, a, b, dtype)) for a, b, dtype in spans if a < b]

    def whole_views(self) -> list[dict[str, Array]]:
        """Every slot and replica, whole, in one part a dtype."""
        parts = []
        for start, stop, dtype in self.layout.runs:
            part = self._span(start, stop, dtype)
            kind = dtype_of(dtype)
            part.update((k, m[start:stop].view(kind)) for k, m in self.replicas.items())
            parts.append(part)
        return parts

    def _span(self, start: int, stop: int, dtype: str) -> dict[str, Array]:
        kind = dtype_of(dtype)
        views = {k: m[start:stop].view(kind) for k, m in self.memory.items()}
        if self.rates is not None:
            views[RATE] = self._rates(start, stop, kind)
        return views

    def _rates(self, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
        """The learning rate of every element of a span; no memory where they are all equal."""
        assert self.rates is not None
        wide = accumulator(dtype)
        if isinstance(self.rates, float):
            return np.broadcast_to(wide.type(self.rates), (stop - start) // dtype.itemsize)
        edges = np.clip([*self.layout.offsets, self.layout.nbytes], start, stop)
        return np.repeat(np.asarray(self.rates, wide), np.diff(edges) // dtype.itemsize)

    def on_wire(self, cell: Cell, rule: str) -> np.dtype[Any]:
        """The dtype in which a cell travels; exact means are never rounded on the wire."""
        rounds = self.wire_dtype is not None and rule == "mix"
        if rounds and cell.dtype in ("float32", "float64"):
            return dtype_of(str(self.wire_dtype))
        return dtype_of(cell.dtype)
