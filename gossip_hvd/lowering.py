"""A stage lowered to what one rank does: its cells, the ranks at the other end, and the memory.

Plans speak of nodes and units; messages go between ranks, cell by cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gossip_hvd.mixing import Array, dtype_of
from gossip_hvd.rounds import Round, Stage, Transfer
from gossip_hvd.segments import ALIGN, Cell
from gossip_hvd.transport import Bytes

if TYPE_CHECKING:
    from gossip_hvd.seat import Seat

Key = tuple[str, int]
"""A slot and the index of a cell in the stage's grid."""

Entry = tuple[Transfer, Cell, int]
"""A transfer, one of its cells, and the world rank at the other end."""


class Lowered:
    """One rank's part of a stage.

    Args:
        seat: the rank's.
        stage: what its node sends and receives.
        late: whether it is merged later, from a snapshot.

    Attributes:
        coming, going: what is received and sent, by index of the cell.
        incoming, outgoing: bytes of the memory to receive into and to send from, by key.
    """

    def __init__(self, seat: Seat, stage: Stage, *, late: bool) -> None:
        self._grid, self._late = stage.grid, late
        self.coming = _by_cell(seat, stage, stage.receives)
        self.going = _by_cell(seat, stage, stage.sends)
        self.incoming: dict[Key, int] = {}
        self.outgoing: dict[Key, int] = {}
        for index in dict.fromkeys((*self.coming, *self.going)):
            for transfer, cell, _ in self.coming.get(index, ()):
                key = transfer.slot, index
                size = room(cell, seat.on_wire(cell, stage.rule))
                self.incoming[key] = self.incoming.get(key, 0) + size
            for transfer, cell, _ in self.kept(index):
                size = room(cell, seat.on_wire(cell, stage.rule))
                self.outgoing[transfer.slot, index] = size

    @property
    def sources(self) -> list[int]:
        """The other end of every message that is received."""
        return [peer for entries in self.coming.values() for _, _, peer in entries]

    @property
    def destinations(self) -> list[int]:
        """The other end of every message that is sent."""
        return [peer for entries in self.going.values() for _, _, peer in entries]

    def kept(self, index: int) -> list[Entry]:
        """Of which values a copy may be needed: a late merge needs that of what comes, too."""
        coming = self.coming.get(index, []) if self._late else []
        return [*self.going.get(index, []), *coming]

    def lies_as(self, other: Lowered) -> bool:
        """Whether both use the same memory for the same cells."""
        return (
            self._grid == other._grid
            and self.incoming == other.incoming
            and self.outgoing == other.outgoing
        )


def _by_cell(seat: Seat, stage: Stage, transfers: Iterable[Transfer]) -> dict[int, list[Entry]]:
    found: dict[int, list[Entry]] = {}
    for transfer in transfers:
        for cell in seat.cells(stage.grid, transfer.unit):
            peer = seat.holder(stage.grid, cell, transfer.peer)
            found.setdefault(cell.index, []).append((transfer, cell, peer))
    return found


@dataclass(frozen=True)
class Posted:
    """What a late flight has given to its peers, enough to post it once more.

    Attributes:
        note: the node's note.
        values: the snapshot of this rank's cells as it went out, end to end.
    """

    note: Array
    values: Bytes

    @classmethod
    def of(cls, note: Array, sent: Iterable[Array]) -> Posted:
        """A copy of what has been sent."""
        values = [np.empty(0, np.uint8), *(part.view(np.uint8) for part in sent)]
        return cls(note.copy(), np.concatenate(values))

    def into(self, cell: Array) -> Posted:
        """Put the first values into a cell; returns the rest."""
        first, rest = np.split(self.values, [cell.nbytes])
        cell.view(np.uint8)[...] = first
        return Posted(self.note, rest)


def posted_bytes(seat: Seat, round_: Round) -> int:
    """The size of the snapshot that a late flight of this round puts out on this rank."""
    distinct = {
        (t.slot, cell.index): travelling(cell, seat.on_wire(cell, stage.rule))
        for stage in round_.stages
        for t in (*stage.sends, *stage.receives)
        for cell in seat.cells(stage.grid, t.unit)
    }
    return sum(distinct.values())


def travelling(cell: Cell, dtype: np.dtype[Any]) -> int:
    """Bytes of a cell on the wire."""
    return cell.nbytes // dtype_of(cell.dtype).itemsize * dtype.itemsize


def room(cell: Cell, dtype: np.dtype[Any]) -> int:
    """Bytes kept for a cell in an arena, so that the next one is aligned."""
    return -(-travelling(cell, dtype) // ALIGN) * ALIGN
