"""A wire between virtual ranks of one process, with a seeded order of delivery.

The same engine that runs over MPI runs over this wire, so a simulation is never a second
implementation. Each message is delivered after a random number of the receiver's or sender's
tests, by seed; messages of one (sender, receiver, tag) keep their order, as MPI promises.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from gossip_hvd.errors import PeerLostError
from gossip_hvd.transport import Bytes


@dataclass(slots=True, eq=False)
class _Letter:
    """A message under way: its bytes stay in the sender's buffer until it is delivered."""

    data: Bytes
    delay: int
    delivered: bool = False


@dataclass(slots=True, eq=False)
class _Slot:
    """A posted receive."""

    key: tuple[int, int, int]
    data: Bytes
    done: bool = False


@dataclass
class Switchboard:
    """Connects ``size`` virtual ranks.

    Attributes:
        size: number of ranks.
        seed: decides how long every message is under way.
        slowest: a message waits for at most this many tests of its receiver.
    """

    size: int
    seed: int = 0
    slowest: int = 4
    _letters: dict[tuple[int, int, int], deque[_Letter]] = field(default_factory=dict)
    _slots: dict[tuple[int, int, int], deque[_Slot]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def wire(self, rank: int) -> MemoryWire:
        """The wire of one virtual rank."""
        return MemoryWire(rank, self)

    def idle(self) -> bool:
        """True where no message is under way and no receive is open."""
        return not any(self._letters.values()) and not any(self._slots.values())

    def _draw_delay(self) -> int:
        return self._random.randint(0, self.slowest)


class MemoryWire:
    """One virtual rank's end of the switchboard; see ``transport.Wire``."""

    def __init__(self, rank: int, board: Switchboard) -> None:
        self.rank = rank
        self._board = board

    def send(self, peer: int, tag: int, data: Bytes) -> _Letter:
        """Put ``data`` on the way to ``peer``."""
        letter = _Letter(data, self._board._draw_delay())
        self._board._letters.setdefault((self.rank, peer, tag), deque()).append(letter)
        return letter

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
        slots, letters = self._board._slots[slot.key], self._board._letters.get(slot.key)
        if not letters or slots[0] is not slot:
            return
        letter = letters[0]
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
        letters.popleft()
        slots.popleft()
