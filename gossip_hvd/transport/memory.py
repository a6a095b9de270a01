"""A wire between virtual ranks of one process, with a seeded order of delivery.

The same engine that runs over MPI runs over this wire, so a simulation is never a second
implementation. Each message is delivered after a random number of the receiver's or sender's
tests, by seed; messages of one (sender, receiver, tag) keep their order, as MPI promises. They are
numbered, so that faults beneath (see ``faults.py``) cannot break that promise unseen.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

from gossip_hvd.errors import PeerLostError
from gossip_hvd.transport import Bytes
from gossip_hvd.transport.faults import NONE, Faults

Key = tuple[int, int, int]
"""Sender, receiver and tag."""


@dataclass(slots=True, eq=False)
class _Letter:
    """A message under way: its bytes stay in the sender's buffer until it is delivered.

    Attributes:
        number: among the messages of its key.
        data: its bytes, as many as are left of them.
        delay: for how many tests of its receiver it is still under way.
        delivered: whether its sender may forget it.
    """

    number: int
    data: Bytes
    delay: int
    delivered: bool = False


@dataclass(slots=True, eq=False)
class _Slot:
    """A posted receive."""

    key: Key
    data: Bytes
    done: bool = False


@dataclass
class Switchboard:
    """Connects ``size`` virtual ranks.

    Attributes:
        size: number of ranks.
        seed: decides how long every message is under way.
        slowest: a message waits for at most this many tests of its receiver.
        faults: what befalls messages.
        sent: messages so far.
    """

    size: int
    seed: int = 0
    slowest: int = 4
    faults: Faults = NONE
    sent: int = 0
    _letters: dict[Key, deque[_Letter]] = field(default_factory=dict)
    _slots: dict[Key, deque[_Slot]] = field(default_factory=dict)
    _numbers: Counter[Key] = field(default_factory=Counter)
    _taken: Counter[Key] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def wire(self, rank: int) -> MemoryWire:
        """The wire of one virtual rank."""
        return MemoryWire(rank, self)

    def idle(self) -> bool:
        """True where no message is under way and no receive is open."""
        under_way = (
            letter.number >= self._taken[key]
            for key, letters in self._letters.items()
            for letter in letters
        )
        return not any(under_way) and not any(self._slots.values())

    def _post(self, key: Key, data: Bytes) -> _Letter:
        """Put a message on its way, whatever befalls it there."""
        letter = _Letter(self._numbers[key], data, self._random.randint(0, self.slowest))
        self._numbers[key] += 1
        fate = self.faults.fate(self.sent)
        queue = self._letters.setdefault(key, deque())
        if fate == "drop":
            # As over a network: who sends has handed it over, and hears of nothing.
            letter.delivered = True
        elif fate == "reorder":
            queue.appendleft(letter)
        else:
            queue.append(letter)
        if fate in ("delay", "reorder"):
            letter.delay += self.faults.lateness(self.sent)
        elif fate == "duplicate":
            queue.append(_Letter(letter.number, data.copy(), letter.delay))
        elif fate == "truncate":
            letter.data = data[: data.size // 2]
        self.sent += 1
        return letter

    def _next(self, key: Key) -> _Letter | None:
        """The message that is due; copies of those before it are thrown away."""
        letters = self._letters.get(key, deque())
        for letter in list(letters):
            if letter.number < self._taken[key]:
                letters.remove(letter)
        return next((one for one in letters if one.number == self._taken[key]), None)


class MemoryWire:
    """One virtual rank's end of the switchboard; see ``transport.Wire``."""

    def __init__(self, rank: int, board: Switchboard) -> None:
        self.rank = rank
        self._board = board

    def send(self, peer: int, tag: int, data: Bytes) -> _Letter:
        """Put ``data`` on the way to ``peer``."""
        return self._board._post((self.rank, peer, tag), data)

    def receive(self, peer: int, tag: int, data: Bytes) -> _Slot:
        """Open a receive of exactly ``data.nbytes`` from ``peer``."""
        slot = _Slot((peer, self.rank, tag), data)
        self._board._slots.setdefault(slot.key, deque()).append(slot)
        return slot

    def test(self, handles: list[_Letter | _Slot]) -> list[int]:
        """Positions of handles that are complete."""
        for handle in handles:
            if isinstance(handle, _Slot) and not handle.done:
                self._deliver(handle)
        return [
            i for i, h in enumerate(handles) if (h.done if isinstance(h, _Slot) else h.delivered)
        ]

    def _deliver(self, slot: _Slot) -> None:
        board, slots = self._board, self._board._slots[slot.key]
        letter = board._next(slot.key) if slots[0] is slot else None
        if letter is None:
            return
        if letter.delay > 0:
            letter.delay -= 1
            return
        if letter.data.nbytes != slot.data.nbytes:
            sender, receiver, tag = slot.key
            raise PeerLostError(
                f"rank {receiver} expected {slot.data.nbytes} bytes from rank {sender} "
                f"(tag {tag}) and got {letter.data.nbytes}."
            )
        slot.data[...] = letter.data
        slot.done = letter.delivered = True
        board._letters[slot.key].remove(letter)
        board._taken[slot.key] += 1
        slots.popleft()
