"""One exchange: all messages of one stage, posted, polled and finished over any wire.

All receives are posted at once. A receiver then sends one byte, its *word*, to every peer it
expects data from; a sender waits for that word before it sends. So data never arrives before its
buffer is posted, and a fast node cannot put its next round in front of a slow node's last one.

Messages to several peers are interleaved: each peer's flow advances by the same fraction, so that
all flows end together. With a window, few are under way at once, and the order is what the wire
sees; every flow then gets the part of the link that its bytes need, and no more.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np

from gossip_hvd.recorder import Recorder
from gossip_hvd.transport import Bytes, Wire

KINDS = {"data": 0, "word": 1, "note": 2, "gather": 3}
SLOTS = 4
SEQUENCES = 16


@dataclass(slots=True, eq=False)
class Message:
    """One message of one exchange.

    Attributes:
        peer: world rank at the other end.
        tag: the same at both ends, unique in the exchange for this pair of ranks.
        data: what is sent, or where it is received; 1-D bytes.
        key: what the message is about, for whoever posted it.
        cell: index of its cell, or -1.
    """

    peer: int
    tag: int
    data: Bytes
    key: Any = None
    cell: int = -1


@dataclass(order=True, slots=True)
class _Queued:
    """A message that waits for its turn: by the fraction of its flow that goes before it."""

    fraction: float
    order: int
    message: Message = field(compare=False)


def tag_of(kind: str, flight: int, stage: int, cell: int = 0, slot: int = 0) -> int:
    """The tag of a message; flights and stages wrap around, long after they are over."""
    sequence = (flight * 2 + stage % 2) % SEQUENCES
    return ((cell * SLOTS + slot) * len(KINDS) + KINDS[kind]) * SEQUENCES + sequence


class Exchange:
    """All messages of one stage.

    Args:
        wire: what carries them.
        flight: sequence number of the flight, equal on all ranks.
        stage: index of the stage in its round.
        receives: posted at once.
        destinations: the ranks that something will be sent to, as often as one likes.
        gated: False where receivers give no word (small or node-internal messages).
        window: how many sends are under way at once; None for all.
        record: told of every event.
    """

    def __init__(
        self,
        wire: Wire,
        flight: int,
        stage: int,
        receives: Sequence[Message],
        destinations: Iterable[int] = (),
        *,
        gated: bool = True,
        window: int | None = None,
        record: Recorder | None = None,
    ) -> None:
        self.flight, self.stage = flight, stage
        self._wire = wire
        self._record = record or Recorder(1)
        self._owner: int | None = None
        self._handles: list[Any] = []
        self._pending: list[tuple[str, Message]] = []
        self._held: dict[int, list[_Queued]] = {}
        self._ready: list[_Queued] = []
        self._sending, self._window, self._gated = 0, window, gated
        self._order = count()
        word = tag_of("word", flight, stage)
        if gated:
            for peer in dict.fromkeys(destinations):
                self._post("word", Message(peer, word, np.empty(1, np.uint8)))
                self._held[peer] = []
        for message in receives:
            self._post("receive", message)
        self._record("post", flight, stage)
        if gated:
            for peer in dict.fromkeys(m.peer for m in receives):
                self._post("say", Message(peer, word, np.zeros(1, np.uint8)))

    def send(self, messages: Iterable[Message]) -> None:
        """Send more; a gated exchange holds a message until its receiver's word has come."""
        batch = list(messages)
        counts, places = Counter(m.peer for m in batch), Counter[int]()
        for message in batch:
            places[message.peer] += 1
            fraction = (places[message.peer] - 0.5) / counts[message.peer]
            queued = _Queued(fraction, next(self._order), message)
            if message.peer in self._held:
                self._held[message.peer].append(queued)
            else:
                heappush(self._ready, queued)
        self._fill_window()

    @property
    def done(self) -> bool:
        """True once nothing is outstanding."""
        return not self._handles and not self._held

    def poll(self) -> list[tuple[str, Message]]:
        """Move what can move; returns what has completed, as ("send" | "receive", message).

        Raises:
            PeerLostError: where the wire reports a failed transfer.
        """
        self._assert_owner()
        if not self._handles:
            return []
        ready = sorted(self._wire.test(self._handles))
        if not ready:
            return []
        completed = [self._pending[i] for i in ready]
        for i in reversed(ready):
            del self._handles[i], self._pending[i]
        for what, message in completed:
            if what == "word":
                self._record("word", self.flight, self.stage, -1, message.peer)
                for queued in self._held.pop(message.peer, ()):
                    heappush(self._ready, queued)
            elif what != "say":
                past = "sent" if what == "send" else "received"
                self._note(past, message)
                self._sending -= past == "sent"
                self._count(past, message.data.nbytes)
        self._fill_window()
        return [entry for entry in completed if entry[0] in ("send", "receive")]

    def outstanding(self) -> list[tuple[str, Message]]:
        """What is still under way, for an error: what is waited for, and which message."""
        held = [("word", queued.message) for queue in self._held.values() for queued in queue]
        ready = [("send", queued.message) for queued in self._ready]
        return [entry for entry in self._pending if entry[0] != "say"] + held + ready

    def hand_over(self) -> None:
        """Let another thread poll from now on; call it when no poll is running."""
        self._owner = None

    def _fill_window(self) -> None:
        while self._ready and (self._window is None or self._sending < self._window):
            self._sending += 1
            self._post("send", heappop(self._ready).message)

    def _post(self, what: str, message: Message) -> None:
        verb = self._wire.send if what in ("send", "say") else self._wire.receive
        self._handles.append(verb(message.peer, message.tag, message.data))
        self._pending.append((what, message))
        if what == "send":
            self._note("send", message)

    def _count(self, past: str, nbytes: int) -> None:
        # Messages without a word stay inside the node.
        if not self._gated:
            self._record.bytes_shared += nbytes if past == "sent" else 0
        elif past == "sent":
            self._record.bytes_sent += nbytes
        else:
            self._record.bytes_received += nbytes

    def _note(self, what: str, message: Message) -> None:
        self._record(what, self.flight, self.stage, message.cell, message.peer, message.data.nbytes)

    def _assert_owner(self) -> None:
        # Two threads that test one MPI request corrupt the heap: a request has one owner.
        me = threading.get_ident()
        if self._owner is None:
            self._owner = me
        if self._owner != me:
            raise AssertionError(f"thread {me} polls an exchange that thread {self._owner} owns")
