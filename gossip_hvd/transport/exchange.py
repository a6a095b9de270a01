"""One exchange: all messages of one stage, posted, polled and finished over any wire.

A receiver posts a receive and then asks its peer for that message, with a *word* that names its
tag; a sender waits for the word. So data never arrives before its buffer is posted, a fast node
cannot put its next round in front of a slow node's last one, and a receiver decides in which order
its link is used.

Every peer's flow has under way its own part of what the link may carry (see ``traffic``), so that
all flows end together. Messages may be added cell by cell, as the memory that they use becomes
free; how many there will be is known from the beginning.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from gossip_hvd.errors import PlanError
from gossip_hvd.recorder import Recorder
from gossip_hvd.transport import Bytes, Wire
from gossip_hvd.transport.traffic import Traffic, Turn

KINDS = {"data": 0, "word": 1, "note": 2, "gather": 3, "vote": 4}
SLOTS = 4
SEQUENCES = 16
WORD = 24
"""Bytes of a word: a tag, the number of the round, its kind."""


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


def tag_of(kind: str, flight: int, stage: int, cell: int = 0, slot: int = 0) -> int:
    """The tag of a message; flights and stages wrap around, long after they are over."""
    sequence = (flight * 2 + stage % 2) % SEQUENCES
    return ((cell * SLOTS + slot) * len(KINDS) + KINDS[kind]) * SEQUENCES + sequence


def cell_of(tag: int) -> int:
    """The cell that a tag speaks of."""
    return tag // (SLOTS * len(KINDS) * SEQUENCES)


class Exchange:
    """All messages of one stage.

    Args:
        wire: what carries them.
        flight: sequence number of the flight, equal on all ranks.
        stage: index of the stage in its round.
        sources: the peer of every message that will be received.
        destinations: the peer of every message that will be sent.
        purpose: number and kind of the round, which words carry: two ranks that exchange for
            different ends, as where one averages and the other trains, find out at once.
        gated: False where receivers give no word (node-internal messages).
        asking: how much this rank may ask for, over all its exchanges; None for no limit.
        sending: likewise, how much of what it was asked for it may send at once.
        record: told of every event.
    """

    def __init__(
        self,
        wire: Wire,
        flight: int,
        stage: int,
        sources: Iterable[int] = (),
        destinations: Iterable[int] = (),
        *,
        purpose: tuple[int, str] = (0, ""),
        gated: bool = True,
        asking: Traffic | None = None,
        sending: Traffic | None = None,
        record: Recorder | None = None,
    ) -> None:
        self.flight, self.stage, self._purpose = flight, stage, purpose
        self._kind = crc32(purpose[1].encode())
        self._wire, self._gated = wire, gated
        self._record = record or Recorder(1)
        self._owner: int | None = None
        self._handles: list[Any] = []
        self._pending: list[tuple[str, Message]] = []
        coming, going = list(sources), list(destinations)
        turn = flight, stage
        self._unasked = _Flows(turn, coming, asking if gated else None)
        self._unsent = _Flows(turn, going, sending if gated else None)
        self._words = Counter(going if gated else ())
        self._asked_for: set[tuple[int, int]] = set()
        self._held: dict[tuple[int, int], Message] = {}
        for peer in list(self._words):
            self._await_word(peer)
        self._record("post", flight, stage)

    def receive(self, messages: Iterable[Message]) -> None:
        """Ask for these messages, as traffic allows."""
        for message in messages:
            self._unasked.add(message)
        self._unasked.release(self._ask)

    def send(self, messages: Iterable[Message]) -> None:
        """Send these messages, each once its receiver has asked for it."""
        for message in messages:
            if not self._gated:
                self._unsent.left += 1
                self._send(message)
            elif (at := (message.peer, message.tag)) in self._asked_for:
                self._asked_for.remove(at)
                self._unsent.add(message)
            else:
                self._held[at] = message
        self._unsent.release(self._send)

    @property
    def done(self) -> bool:
        """True once nothing is outstanding."""
        return not (self._handles or self._unasked.left or self._unsent.left)

    def poll(self) -> list[tuple[str, Message]]:
        """Move what can move; returns what has completed, as ("send" | "receive", message).

        Raises:
            PeerLostError: where the wire reports a failed transfer.
            PlanError: where a peer is in another exchange.
        """
        self._assert_owner()
        ready = sorted(self._wire.test(self._handles))
        completed = [self._pending[i] for i in ready]
        for i in reversed(ready):
            del self._handles[i], self._pending[i]
        for what, message in completed:
            if what == "word":
                self._word_came(message)
            elif what != "say":
                self._completed(what, message)
        self._unasked.release(self._ask)
        self._unsent.release(self._send)
        return [entry for entry in completed if entry[0] in ("send", "receive")]

    def outstanding(self) -> list[tuple[str, Message]]:
        """What is still under way, for an error: what is waited for, and which message."""
        posted = [entry for entry in self._pending if entry[0] in ("send", "receive")]
        unasked = [("receive", message) for message in self._unasked.waiting()]
        unsent = [("send", message) for message in self._unsent.waiting()]
        held = [("word", message) for message in self._held.values()]
        return posted + unasked + unsent + held

    def hand_over(self) -> None:
        """Let another thread poll from now on; call it when no poll is running."""
        self._owner = None

    def _ask(self, message: Message) -> None:
        self._post("receive", message)
        if self._gated:
            word = np.array([message.tag, self._purpose[0], self._kind], np.int64)
            self._post("say", Message(message.peer, self._word, word.view(np.uint8)))

    def _send(self, message: Message) -> None:
        self._post("send", message)
        self._note("send", message)

    @property
    def _word(self) -> int:
        return tag_of("word", self.flight, self.stage)

    def _await_word(self, peer: int) -> None:
        if self._words[peer]:
            self._words[peer] -= 1
            self._post("word", Message(peer, self._word, np.empty(WORD, np.uint8)))

    def _word_came(self, word: Message) -> None:
        tag, number, kind = word.data.view(np.int64).tolist()
        if (number, kind) != (self._purpose[0], self._kind):
            raise PlanError(
                f"rank {self._wire.rank} is in round {self._purpose[0]} ({self._purpose[1]}), and "
                f"rank {word.peer} in round {number} of another kind: one of them averages, or "
                "has made another number of steps. Let all ranks take equally many steps and call "
                "the same operations in the same order."
            )
        at = word.peer, tag
        self._record("word", self.flight, self.stage, cell_of(tag), word.peer)
        self._await_word(word.peer)
        if at in self._held:
            self._unsent.add(self._held.pop(at))
        else:
            self._asked_for.add(at)

    def _completed(self, what: str, message: Message) -> None:
        (self._unasked if what == "receive" else self._unsent).over(message)
        past = {"send": "sent", "receive": "received"}[what]
        self._note(past, message)
        self._count(past, message.data.nbytes)

    def _post(self, what: str, message: Message) -> None:
        verb = self._wire.send if what in ("send", "say") else self._wire.receive
        self._handles.append(verb(message.peer, message.tag, message.data))
        self._pending.append((what, message))

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


class _Flows:
    """Messages that wait until traffic allows them, peer by peer.

    Args:
        turn: whose they are.
        peers: one entry a message that will be added.
        traffic: of their direction; None for no limit.

    Attributes:
        left: messages that have not come or gone.
    """

    def __init__(self, turn: Turn, peers: Iterable[int], traffic: Traffic | None) -> None:
        self._turn, self._traffic = turn, traffic
        counts = Counter(peers)
        self.left = counts.total()
        self._parts = {peer: count / self.left for peer, count in counts.items()}
        self._queues: dict[int, deque[Message]] = {}
        if traffic is not None and self.left:
            traffic.begin(turn)

    def add(self, message: Message) -> None:
        """One more."""
        self._queues.setdefault(message.peer, deque()).append(message)

    def release(self, go: Callable[[Message], None]) -> None:
        """Let go what traffic allows now."""
        for peer, queue in self._queues.items():
            while queue and self._allows(peer, queue[0]):
                go(queue.popleft())

    def over(self, message: Message) -> None:
        """One that was let go has come or gone."""
        self.left -= 1
        if self._traffic is None:
            return
        self._traffic.give_back(self._turn, message.peer, message.data.nbytes)
        if not self.left:
            self._traffic.end(self._turn)

    def waiting(self) -> list[Message]:
        """Those that have not been let go."""
        return [message for queue in self._queues.values() for message in queue]

    def _allows(self, peer: int, message: Message) -> bool:
        return self._traffic is None or self._traffic.take(
            self._turn, peer, self._parts[peer], message.data.nbytes
        )
