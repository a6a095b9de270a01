"""A ring buffer of the last events of one rank's transfers, for profiles and post-mortems."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple


class Event(NamedTuple):
    """One thing that happened to a transfer.

    Attributes:
        time: seconds on this machine's monotonic clock.
        what: ``post``, ``word``, ``send``, ``sent``, ``received``, ``mixed``, ``done`` …
        flight: sequence number of the flight (see ``flight.py``).
        stage: index of the stage in its round.
        cell: index of the cell, or -1.
        peer: world rank at the other end, or -1.
        nbytes: bytes concerned.
    """

    time: float
    what: str
    flight: int
    stage: int
    cell: int = -1
    peer: int = -1
    nbytes: int = 0


class Recorder:
    """Keeps the last events; cheap enough to be always on (one tuple an event).

    Args:
        capacity: events that are kept.
        key: of the model whose transfers these are.

    Attributes:
        events: the last ones, oldest first.
        count: of all events so far.
        bytes_sent: to other nodes, so far.
        bytes_received: from other nodes, so far.
        bytes_shared: sent to ranks of the same node, so far.
    """

    def __init__(self, capacity: int = 4096, key: str = "") -> None:
        self.key = key
        self.events: deque[Event] = deque(maxlen=capacity)
        self.count = 0
        self.bytes_sent = self.bytes_received = 0
        self.bytes_shared = 0

    @property
    def flights(self) -> int:
        """Number of the latest flight of which anything is kept."""
        return max((event.flight for event in list(self.events)), default=0)

    def __call__(
        self, what: str, flight: int, stage: int, cell: int = -1, peer: int = -1, nbytes: int = 0
    ) -> None:
        """Note that ``what`` happened now."""
        self.count += 1
        self.events.append(Event(time.monotonic(), what, flight, stage, cell, peer, nbytes))
