"""One round in flight on one rank: lowered to messages, polled, mixed as it arrives, gathered.

A flight may land in two ways. *At once* (ATC): nothing else touches the weights, so values are
sent from where they lie and each cell is mixed the moment it is complete. *Late* (AWC): values
are sent from a snapshot and merged when the engine says so, in difference form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gossip_hvd.gather import Gather
from gossip_hvd.memory import Memory
from gossip_hvd.methods.contract import Arrival, Method, State
from gossip_hvd.mixing import Array, dtype_of
from gossip_hvd.node import Cluster
from gossip_hvd.recorder import Recorder
from gossip_hvd.rounds import SHARED_SLOTS, Round, Stage, Transfer
from gossip_hvd.segments import ALIGN, LARGEST_MESSAGE, Cell, Grid, Layout, owner
from gossip_hvd.transport import Bytes, Wire
from gossip_hvd.transport.exchange import Exchange, Message, tag_of

Key = tuple[str, int]
"""A slot and the index of a cell in the stage's grid."""


class Arena:
    """Receive or send memory that is handed out afresh each stage and kept between rounds."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._memory.nbytes)

    def reset(self, nbytes: int) -> None:
        """Forget what was handed out; make room for ``nbytes`` in all."""
        if nbytes > self._memory.nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        self._used = 0

    def take(self, nbytes: int) -> Bytes:
        """The next ``nbytes``."""
        start, self._used = self._used, self._used + nbytes
        return self._memory[start : self._used]


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
        wire_dtype: what float32 and float64 values are rounded to on the wire, or None.
        largest: bytes of the largest message.
        record: ring buffer of events.
    """

    cluster: Cluster
    rank: int
    layout: Layout
    wire: Wire
    memory: Memory
    arrays: Mapping[str, Bytes] = field(default_factory=dict)
    wire_dtype: str | None = None
    largest: int = LARGEST_MESSAGE
    record: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        sizes = self.cluster.node_sizes
        self.node = self.cluster.node_of(self.rank)
        self.index = self.cluster.node_rank(self.rank)
        self.ranks = sizes[self.node]
        self.siblings = [r for r in self.cluster.nodes[self.node] if r != self.rank]
        self.share = self.layout.share(self.ranks, self.index)
        self.incoming, self.outgoing = Arena(), Arena()
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
        dtype = dtype_of(cell.dtype)
        views = {k: m[cell.start : cell.stop].view(dtype) for k, m in self.memory.items()}
        a, b = cell.start - self.share.start, cell.stop - self.share.start
        views.update((k, m[a:b].view(dtype)) for k, m in self.arrays.items())
        return views

    def on_wire(self, cell: Cell, rule: str) -> np.dtype[Any]:
        """The dtype in which a cell travels; exact means are never rounded on the wire."""
        rounds = self.wire_dtype is not None and rule == "mix"
        if rounds and cell.dtype in ("float32", "float64"):
            return dtype_of(str(self.wire_dtype))
        return dtype_of(cell.dtype)


class Flight:
    """One round of one method on one rank.

    Args:
        seat: this rank's.
        method: plans have been made by it, arrivals are given to it.
        state: the method's, before the round.
        round_: what to exchange.
        sequence: counts flights, equal on all ranks.
        late: True to merge only when ``land`` is called.
        loss: the loss that the user reported, for the method's note.
    """

    def __init__(
        self,
        seat: Seat,
        method: Method,
        state: State,
        round_: Round,
        sequence: int,
        *,
        late: bool = False,
        loss: float | None = None,
    ) -> None:
        self.seat, self.method, self.state, self.round = seat, method, state, round_
        self.sequence, self.late = sequence, late
        self.done = False
        self.notes: dict[int, Array] = {}
        self.own_note = np.asarray(method.note(state, loss), np.float64)
        self._stage = -1
        self._exchange: Exchange | None = None
        self._gather: Gather | None = None
        self._next_stage()

    @property
    def arrived(self) -> bool:
        """True once the last stage's messages have all come and gone."""
        last = self._stage >= len(self.round.stages) - 1
        return self.done or (last and self._exchange is not None and self._exchange.done)

    def poll(self) -> bool:
        """Move what can move, mix what is complete; True once all is over."""
        if self.done:
            return True
        if self._exchange is not None:
            for what, message in self._exchange.poll():
                self._completed(what, message)
        if self._gather is not None:
            self._gather.poll()
        if self._exchange is not None and self._exchange.done and not self._open and not self.late:
            self._next_stage()
        if self._exchange is None and (self._gather is None or self._gather.done):
            self.done = True
            self.seat.record("done", self.sequence, self._stage)
        return self.done

    def hand_over(self) -> None:
        """Let another thread poll from now on."""
        if self._exchange is not None:
            self._exchange.hand_over()

    def land(self) -> None:
        """Merge a late flight that has arrived; the node's gather then needs polling."""
        assert self.late
        assert self.arrived
        if not self.round.stages:
            return
        self._open_gather()
        for key in list(self._open):
            self._mix(key)
        self._next_stage()

    def outstanding(self) -> list[tuple[str, Message]]:
        """Messages still under way."""
        parts = [part for part in (self._exchange, self._gather) if part is not None]
        return [entry for part in parts for entry in part.outstanding()]

    def describe(self) -> str:
        """Who waits for whom, in one sentence."""
        seat = self.seat
        where = f"rank {seat.rank} (node {seat.node}), round {self.round.number}"
        waiting = self.outstanding()
        if not waiting:
            return f"{where}: nothing outstanding"
        what, message = waiting[0]
        stage = self.round.stages[min(self._stage, len(self.round.stages) - 1)]
        grid = seat.grid(stage.grid)
        unit = grid.units[grid.cells[message.cell].unit] if message.cell >= 0 else "-"
        verb = {
            "receive": "waits for data from",
            "send": "waits to send to",
            "word": "waits for the word of",
        }[what]
        return (
            f"{where}, stage {self._stage} ({stage.rule}), segment {unit!r}: {verb} rank "
            f"{message.peer} (node {seat.cluster.node_of(message.peer)}); "
            f"{len(waiting)} messages outstanding"
        )

    @property
    def _last(self) -> bool:
        return self._stage == len(self.round.stages) - 1

    def _open_gather(self) -> None:
        """From now on siblings' cells may be received into place; cells at rest are sent."""
        if self.seat.siblings:
            self._gather = Gather(self.seat, self.round, self.sequence)
            self._gather.release_all(self.round.stages[-1].grid, but=set(self._open))

    # One stage -------------------------------------------------------------------------------

    def _next_stage(self) -> None:
        self._stage += 1
        self._exchange = None
        self._open: dict[Key, int] = {}
        if self._stage >= len(self.round.stages):
            if self._gather is not None:
                self._gather.release_all(but=set())
            return
        stage = self.round.stages[self._stage]
        self._arrivals: dict[Key, list[tuple[Transfer, Array]]] = {}
        self._sent: dict[Key, Array] = {}
        self._in_place: set[Key] = set()
        receives = self._receives(stage)
        sends = self._sends(stage)
        self._note_messages(stage, receives, sends)
        if self._last and not self.late:
            self._open_gather()
        self._exchange = Exchange(
            self.seat.wire, self.sequence, self._stage, receives, sends, record=self.seat.record
        )

    def _receives(self, stage: Stage) -> list[Message]:
        seat = self.seat
        wanted = [(t, cell) for t in stage.receives for cell in seat.cells(stage.grid, t.unit)]
        sizes = [_room(cell, seat.on_wire(cell, stage.rule)) for _, cell in wanted]
        seat.incoming.reset(sum(sizes))
        messages = []
        for (transfer, cell), size in zip(wanted, sizes, strict=True):
            key = (transfer.slot, cell.index)
            dtype = seat.on_wire(cell, stage.rule)
            data = seat.incoming.take(size)[: _travelling(cell, dtype)]
            self._arrivals.setdefault(key, []).append((transfer, data.view(dtype)))
            self._open[key] = self._open.get(key, 0) + 1
            messages.append(self._message(stage, transfer, cell, data))
        return messages

    def _sends(self, stage: Stage) -> list[Message]:
        seat = self.seat
        wanted = [(t, cell) for t in stage.sends for cell in seat.cells(stage.grid, t.unit)]
        distinct = {(t.slot, cell.index): cell for t, cell in wanted}
        seat.outgoing.reset(sum(_room(c, seat.on_wire(c, stage.rule)) for c in distinct.values()))
        for (slot, _), cell in distinct.items():
            self._put_out(stage, slot, cell)
        messages = []
        for transfer, cell in wanted:
            key = (transfer.slot, cell.index)
            data = self._sent[key].view(np.uint8)
            if key in self._open and key in self._in_place:
                # Memory that is still being sent may not be mixed into.
                self._open[key] += 1
            messages.append(self._message(stage, transfer, cell, data))
        return messages

    def _put_out(self, stage: Stage, slot: str, cell: Cell) -> None:
        """Choose the values to send: where they lie if that is safe, else a copy of them."""
        seat, key = self.seat, (slot, cell.index)
        views = seat.views(cell)
        other = self.method.message(self.state, slot, cell.unit, views)
        dtype = seat.on_wire(cell, stage.rule)
        if other is None and not self.late and dtype == views[slot].dtype:
            self._sent[key] = views[slot]
            self._in_place.add(key)
            return
        copy = seat.outgoing.take(_room(cell, dtype))[: _travelling(cell, dtype)].view(dtype)
        copy[...] = views[slot] if other is None else other
        self._sent[key] = copy

    def _message(self, stage: Stage, transfer: Transfer, cell: Cell, data: Bytes) -> Message:
        slot = SHARED_SLOTS.index(transfer.slot)
        tag = tag_of("data", self.sequence, self._stage, cell.index, slot)
        peer = self.seat.holder(stage.grid, cell, transfer.peer)
        return Message(peer, tag, data, (transfer.slot, cell.index), cell.index)

    def _note_messages(self, stage: Stage, receives: list[Message], sends: list[Message]) -> None:
        """Every rank of a node gets the note of each peer node, from the rank opposite it."""
        if not self.own_note.size:
            return
        seat, nodes = self.seat, self.seat.cluster.nodes
        tag = tag_of("note", self.sequence, self._stage)
        for node in dict.fromkeys(t.peer for t in stage.receives):
            note = self.notes[node] = np.empty_like(self.own_note)
            peer = nodes[node][seat.index % len(nodes[node])]
            receives.insert(0, Message(peer, tag, note.view(np.uint8), node))
            for key, arrivals in self._arrivals.items():
                if any(transfer.peer == node for transfer, _ in arrivals):
                    self._open[key] += 1
        for node in dict.fromkeys(t.peer for t in stage.sends):
            for place, peer in enumerate(nodes[node]):
                if place % seat.ranks == seat.index:
                    sends.insert(0, Message(peer, tag, self.own_note.view(np.uint8), None))

    def _completed(self, what: str, message: Message) -> None:
        if self.late or message.key is None:
            return
        if isinstance(message.key, int):  # a note: it opens every cell from that node
            keys = [
                k for k, a in self._arrivals.items() if any(t.peer == message.key for t, _ in a)
            ]
        else:
            counts = message.key in self._open and (
                what == "receive" or message.key in self._in_place
            )
            keys = [message.key] if counts else []
        for key in keys:
            self._open[key] -= 1
            if self._open[key] == 0:
                self._mix(key)

    def _mix(self, key: Key) -> None:
        del self._open[key]
        slot, index = key
        stage = self.round.stages[self._stage]
        cell = self.seat.grid(stage.grid).cells[index]
        views = self.seat.views(cell)
        in_place = key in self._in_place or key not in self._sent
        sent = views[slot] if in_place else self._sent[key]
        transfers = self._arrivals[key]
        arrival = Arrival(
            stage,
            slot,
            cell.unit,
            tuple(t.peer for t, _ in transfers),
            tuple(t.weight for t, _ in transfers),
            sent,
            [values for _, values in transfers],
            self.notes,
            self.own_note,
        )
        self.method.apply(self.state, arrival, views)
        self.seat.record("mixed", self.sequence, self._stage, index)
        if self._last and self._gather is not None:
            self._gather.release(stage.grid, slot, index)


def _travelling(cell: Cell, dtype: np.dtype[Any]) -> int:
    """Bytes of a cell on the wire."""
    return cell.nbytes // dtype_of(cell.dtype).itemsize * dtype.itemsize


def _room(cell: Cell, dtype: np.dtype[Any]) -> int:
    """Bytes kept for a cell in an arena, so that the next one is aligned."""
    return -(-_travelling(cell, dtype) // ALIGN) * ALIGN
