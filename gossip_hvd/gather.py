"""The node's gather: every rank gets from its siblings the cells that they have mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gossip_hvd.rounds import SHARED_SLOTS, Round
from gossip_hvd.segments import Cell
from gossip_hvd.transport import Bytes
from gossip_hvd.transport.exchange import Exchange, Message, tag_of

if TYPE_CHECKING:
    from gossip_hvd.seat import Seat


class Gather:
    """Receives straight into place; sends each of this rank's cells once it is released.

    Args:
        seat: this rank's.
        round_: tells which units change.
        sequence: of the flight.
    """

    def __init__(self, seat: Seat, round_: Round, sequence: int) -> None:
        self._seat, self._sequence = seat, sequence
        touched = dict.fromkeys(
            (stage.grid, t.slot, t.unit)
            for stage in round_.stages
            for t in (*stage.receives, *stage.sends)
            if t.slot in SHARED_SLOTS
        )
        self._mine: dict[tuple[str, str, int], Cell] = {}
        receives = []
        for grid, slot, unit in touched:
            for cell in seat.grid(grid).by_unit[unit]:
                holder = seat.holder(grid, cell, seat.node)
                if holder == seat.rank:
                    self._mine[grid, slot, cell.index] = cell
                else:
                    receives.append(self._message(holder, grid, slot, cell))
        peers = [message.peer for message in receives]
        self._exchange = Exchange(seat.wire, sequence, 0, peers, gated=False, record=seat.record)
        self._exchange.receive(receives)

    @property
    def done(self) -> bool:
        """True once every cell has been released, sent and received."""
        return not self._mine and self._exchange.done

    def poll(self) -> None:
        """Move what can move."""
        self._exchange.poll()

    def release(self, grid: str, slot: str, index: int) -> None:
        """This rank's cell has its final values: send it to all siblings."""
        cell = self._mine.pop((grid, slot, index), None)
        if cell is not None:
            siblings = self._seat.siblings
            self._exchange.send(self._message(rank, grid, slot, cell) for rank in siblings)

    def release_all(self, grid: str | None = None, *, but: set[tuple[str, int]]) -> None:
        """Release every cell, except those of ``grid`` whose (slot, index) is in ``but``."""
        for name, slot, index in list(self._mine):
            if name != grid or (slot, index) not in but:
                self.release(name, slot, index)

    def outstanding(self) -> list[tuple[str, Message]]:
        """Messages still under way."""
        return self._exchange.outstanding()

    def _message(self, rank: int, grid: str, slot: str, cell: Cell) -> Message:
        data: Bytes = self._seat.memory[slot][cell.start : cell.stop]
        # A round may change one slot in both grids, whose cells have the same numbers.
        part = int(grid == "parts")
        tag = tag_of("gather", self._sequence, part, cell.index, SHARED_SLOTS.index(slot))
        return Message(rank, tag, data, None, cell.index)
