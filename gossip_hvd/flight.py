"""One round in flight on one rank: lowered to messages, polled, mixed as it arrives, gathered.

A flight may land in two ways. *At once* (ATC): nothing else touches the weights, so values are
sent from where they lie and each cell is mixed the moment it is complete. *Late* (AWC): values
are sent from a snapshot and merged when the engine says so, in difference form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from gossip_hvd.errors import PlanError
from gossip_hvd.finite import Arrived, finite, healthy, policy_of, refusal
from gossip_hvd.gather import Gather
from gossip_hvd.lowering import Key, Lowered, Posted, room, travelling
from gossip_hvd.methods.contract import Arrival, Context, Method, State
from gossip_hvd.mixing import Array
from gossip_hvd.rounds import SHARED_SLOTS, Round, Stage, Transfer
from gossip_hvd.seat import Lane, Seat
from gossip_hvd.segments import Cell
from gossip_hvd.transport import Bytes
from gossip_hvd.transport.exchange import Exchange, Message, tag_of
from gossip_hvd.waits import Facts


class Flight:
    """One round of one method on one rank.

    Args:
        seat: this rank's.
        method: plans have been made by it, arrivals are given to it.
        state: the method's, before the round.
        round_: what to exchange.
        sequence: counts flights, equal on all ranks.
        late: True to merge only when ``land`` is called.
        context: what the adapter reported, for the method's note.
        behind: a late flight that still uses the same memory; call ``follow`` until it is merged.
        again: what this flight sent and noted before its job was stopped; None for a new flight.
        lane: its memory, by default the first, where one flight is under way at a time.
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
        context: Context | None = None,
        behind: Flight | None = None,
        again: Posted | None = None,
        lane: Lane | None = None,
    ) -> None:
        self.seat, self.method, self.state, self.round = seat, method, state, round_
        self.sequence, self.late, self.lane = sequence, late, lane or seat.lanes[0]
        self.done = self.finished = self._landing = False
        self.notes: dict[int, Array] = {}
        note = again.note if again else method.note(state, round_.number, context or Context())
        self.own_note, self._again = np.asarray(note, np.float64), again
        self._stage, self._behind = -1, behind
        self._exchange: Exchange | None = None
        self._gather: Gather | None = None
        self._next_stage()
        if behind is not None:
            self.follow()

    @property
    def arrived(self) -> bool:
        """True once the last stage's messages have all come and gone."""
        last = self._stage >= len(self.round.stages) - 1
        return self.done or (last and self._exchange is not None and self._exchange.done)

    def poll(self) -> bool:
        """Move what can move, mix what is complete; True once all is over."""
        if self.done:
            return True
        for what, message in self._exchange.poll() if self._exchange is not None else ():
            self._completed(what, message)
        if self._gather is not None:
            self._gather.poll()
        complete = self._exchange is not None and self._exchange.done and not self._open
        if complete and self._mixes:
            self._next_stage()
        if self._exchange is None and (self._gather is None or self._gather.done):
            self.done = True
            self.seat.record("done", self.sequence, self._stage)
        return self.done

    def follow(self) -> None:
        """Exchange the cells that the flight ahead has merged and sent: they are final.

        So the link is never idle between two rounds, and a cell that is late delays no other.
        Memory for the cells is the same in both rounds, or else this waits for all of them.
        """
        ahead = self._behind
        if ahead is None or self._exchange is None:
            return
        if ahead.merged:
            self._behind = None
            self._admit_all()
        elif self._ours.lies_as(ahead._ours):
            free = [index for index in self._waiting if not ahead._busy[index]]
            if free:
                self._admit(free)

    def hand_over(self) -> None:
        """Let another thread poll from now on."""
        if self._exchange is not None:
            self._exchange.hand_over()

    def land(self) -> None:
        """Merge a late flight from now on: what has come at once, the rest as it comes."""
        assert self.late
        if self.done or self._landing:
            return
        self._landing = True
        if self.round.stages:
            self._open_gather()
            self._mix_complete()

    @property
    def merged(self) -> bool:
        """True once this rank's own part of the round is mixed; the gather may go on."""
        return self.done or (self._stage >= len(self.round.stages) and self._mixes)

    @property
    def posted(self) -> Posted:
        """What a late flight of one stage has sent."""
        keys = self._ours.outgoing if self.round.stages else ()
        return Posted.of(self.own_note, [self._sent[key] for key in keys])

    def outstanding(self) -> list[tuple[str, Message]]:
        """Messages still under way."""
        return [e for part in (self._exchange, self._gather) if part for e in part.outstanding()]

    def moved(self) -> int:
        """A number that changes with every event."""
        return self.seat.record.count

    def facts(self) -> Facts:
        """Who waits for whom."""
        seat, waiting = self.seat, self.outstanding()
        if not waiting:
            return Facts(f"{self._where}: nothing outstanding", round=self.round.number)
        # Data has a segment to be named; words and notes have none.
        what, message = next((e for e in waiting if e[1].cell >= 0), waiting[0])
        stage = self.round.stages[min(self._stage, len(self.round.stages) - 1)]
        grid = seat.grid(stage.grid)
        unit = grid.units[grid.cells[message.cell].unit] if message.cell >= 0 else "-"
        verb = {
            "receive": "waits for data from",
            "send": "waits to send to",
            "word": "waits for the word of",
        }[what]
        nbytes = sum(m.data.nbytes for _, m in waiting)
        record = seat.record
        return Facts(
            f"{self._where}, stage {self._stage} ({stage.rule}), segment {unit!r}: {verb} rank "
            f"{message.peer} (node {seat.cluster.node_of(message.peer)}); "
            f"{len(waiting)} messages outstanding ({nbytes} bytes), so far "
            f"{record.bytes_received} bytes received and {record.bytes_sent} sent",
            tuple(dict.fromkeys(m.peer for _, m in waiting)),
            self.round.number,
            unit,
            record.key,
            self.sequence,
        )

    @property
    def _where(self) -> str:
        return f"rank {self.seat.rank} (node {self.seat.node}), round {self.round.number}"

    @property
    def _mixes(self) -> bool:
        return self._landing or not self.late

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
        self._prepare(self.round.stages[self._stage])
        if self._behind is None:
            self._admit_all()
            if self._mixes and self._last:
                self._open_gather()

    def _prepare(self, stage: Stage) -> None:
        """Lower the stage to cells and peers, and wait for the words of those who receive."""
        seat = self.seat
        self._arrivals: dict[Key, list[tuple[Transfer, Array]]] = {}
        self._sent: dict[Key, Array] = {}
        self._in_place: set[Key] = set()
        self._busy: Counter[int] = Counter()
        self._ours = Lowered(seat, stage, late=self.late)
        self._waiting = dict.fromkeys((*self._ours.coming, *self._ours.going))
        self._notes_in, self._notes_out = self._notes(stage)
        self._exchange = Exchange(
            seat.wire,
            self.sequence,
            self._stage,
            [*(m.peer for m in self._notes_in), *self._ours.sources],
            [*(m.peer for m in self._notes_out), *self._ours.destinations],
            purpose=(self.round.number, stage.rule),
            asking=seat.asking,
            sending=seat.sending,
            record=seat.record,
        )

    def _admit_all(self) -> None:
        self.lane.lay(self._ours.incoming, self._ours.outgoing)
        self._admit(list(self._waiting))

    def _admit(self, indices: Sequence[int]) -> None:
        """Exchange these cells from now on."""
        assert self._exchange is not None
        for index in indices:
            del self._waiting[index]
        # Peers learn that they may send before this rank copies what it sends itself.
        receives = [message for index in indices for message in self._receives(index)]
        self._exchange.receive([*self._notes_in, *receives])
        self._count_notes(indices)
        sends = [message for index in indices for message in self._sends(index)]
        self._exchange.send([*self._notes_out, *sends])
        self._notes_in, self._notes_out = [], []
        if self._mixes:
            self._mix_complete()

    def _receives(self, index: int) -> list[Message]:
        seat, stage = self.seat, self.round.stages[self._stage]
        messages = []
        used: Counter[Key] = Counter()
        for transfer, cell, peer in self._ours.coming.get(index, ()):
            key = transfer.slot, index
            dtype = seat.on_wire(cell, stage.rule)
            data = self.lane.incoming[key][used[key] :][: travelling(cell, dtype)]
            used[key] += room(cell, dtype)
            self._arrivals.setdefault(key, []).append((transfer, data.view(dtype)))
            self._open[key] = self._open.get(key, 0) + 1
            messages.append(self._message(transfer, cell, peer, data))
        return messages

    def _sends(self, index: int) -> list[Message]:
        stage = self.round.stages[self._stage]
        going = self._ours.going.get(index, ())
        for transfer, cell, _ in self._ours.kept(index):
            key = transfer.slot, index
            if key in self._sent:
                continue
            self._put_out(stage, transfer.slot, cell)
            if key not in self._open and key not in self._in_place:
                self._open[key], self._arrivals[key] = 0, []
        messages = []
        for transfer, cell, peer in going:
            key = transfer.slot, index
            if key in self._open and key in self._in_place:
                # Memory that is still being sent may not be mixed into.
                self._open[key] += 1
            messages.append(self._message(transfer, cell, peer, self._sent[key].view(np.uint8)))
        slots = {t.slot for t, _, _ in (*self._ours.coming.get(index, ()), *going)}
        self._busy[index] = len(messages) + sum((slot, index) in self._open for slot in slots)
        return messages

    def _put_out(self, stage: Stage, slot: str, cell: Cell) -> None:
        """Choose the values to send: where they lie if that is safe, else a copy of them."""
        seat, key = self.seat, (slot, cell.index)
        views = seat.views(cell)
        other = None
        if stage.rule == "mix" and self._again is None:
            other = self.method.message(self.state, self.round.number, slot, cell.unit, views)
        dtype = seat.on_wire(cell, stage.rule)
        if other is None and not self.late and dtype == views[slot].dtype:
            self._sent[key] = views[slot]
            self._in_place.add(key)
            return
        copy = self.lane.outgoing[key][: travelling(cell, dtype)].view(dtype)
        self._sent[key] = copy
        if self._again is not None:
            self._again = self._again.into(copy)
            return
        try:
            with np.errstate(over="raise"):
                copy[...] = views[slot] if other is None else other
        except FloatingPointError:
            raise PlanError(
                f"{self._where}, segment {seat.grid(stage.grid).units[cell.unit]!r}: a value is "
                f"too large for wire_dtype={dtype.name!r}. Use wire_dtype='bfloat16', or None."
            ) from None

    def _message(self, transfer: Transfer, cell: Cell, peer: int, data: Bytes) -> Message:
        slot, index = transfer.slot, cell.index
        tag = tag_of("data", self.sequence, self._stage, index, SHARED_SLOTS.index(slot))
        return Message(peer, tag, data, (slot, index), index)

    def _notes(self, stage: Stage) -> tuple[list[Message], list[Message]]:
        """Notes to receive and to send: every rank of a node gets the note of each peer node.

        It comes from the rank opposite it.
        """
        seat, nodes = self.seat, self.seat.cluster.nodes
        tag = tag_of("note", self.sequence, self._stage)
        if not self.own_note.size:
            return [], []
        incoming = []
        for node in dict.fromkeys(t.peer for t in stage.receives):
            note = self.notes[node] = np.empty_like(self.own_note)
            peer = nodes[node][seat.index % len(nodes[node])]
            incoming.append(Message(peer, tag, note.view(np.uint8), node))
        outgoing = [
            Message(peer, tag, self.own_note.view(np.uint8))
            for node in dict.fromkeys(t.peer for t in stage.sends)
            for place, peer in enumerate(nodes[node])
            if place % seat.ranks == seat.index
        ]
        return incoming, outgoing

    def _count_notes(self, indices: Sequence[int]) -> None:
        """A cell is complete only with the notes of the nodes that it comes from."""
        if not self.notes:
            return
        for key, arrivals in self._arrivals.items():
            if key[1] in indices:
                self._open[key] += len({t.peer for t, _ in arrivals} & self.notes.keys())

    def _completed(self, what: str, message: Message) -> None:
        if message.key is None:
            return
        if what == "send" and message.cell >= 0:
            self._busy[message.cell] -= 1
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
            if self._open[key] == 0 and self._mixes:
                self._mix(key)

    def _mix_complete(self) -> None:
        """Mix every cell that waits for nothing."""
        for key in [key for key, missing in self._open.items() if not missing]:
            self._mix(key)

    def _mix(self, key: Key) -> None:
        del self._open[key]
        slot, index = key
        self._busy[index] -= 1
        stage = self.round.stages[self._stage]
        cell = self.seat.grid(stage.grid).cells[index]
        views = self.seat.views(cell)
        sent = views[slot] if key in self._in_place else self._sent.get(key, views[slot])
        policy = policy_of(self.seat.nan_policy, slot)
        transfers: Arrived = self._arrivals[key]
        if policy == "skip":
            transfers = healthy(self._where, stage, sent, transfers)
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
            self.round.number,
        )
        self.method.apply(self.state, arrival, views)
        if policy == "raise" and not finite(views[slot]):
            unit = self.seat.grid(stage.grid).units[cell.unit]
            raise refusal(f"{self._where}, segment {unit!r}", self.seat.node, sent, transfers)
        self.seat.record("mixed", self.sequence, self._stage, index)
        if self._last and self._gather is not None:
            self._gather.release(stage.grid, slot, index)
