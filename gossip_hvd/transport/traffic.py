"""How much of one rank's data is under way at once, in one direction, over all its exchanges.

A link that carries two rounds, or several peers' flows, at the same time serves each of them
slowly, and what is needed first then comes last. So the oldest flight may have under way what the
link moves in ``DELAY`` seconds, enough to keep it busy. A younger one moves only while nothing of
an older is under way, or of what an older has asked for nothing has come for ``LATE`` seconds, one
message of every flow at a time: it takes what the older leaves, as where the older's peers are
late. Inside a flight every peer's flow has its own part, so that a late peer delays nobody else's.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

DELAY = 0.05
"""Seconds that a message may queue on the way; long beside the time between two polls."""

LATE = 0.2
"""Seconds without a message after which a flight's peers are taken to be late."""

Turn = tuple[int, int]
"""Flight and stage: the smaller is the older."""


class Traffic:
    """Bytes asked for and not yet received, or sent and not yet gone.

    Args:
        limit: bytes under way at once, or the least of them if it adapts; one message of every
            flow may always be. None for no limit.
        adapts: whether the limit follows what the link moves.
        clock: seconds.
    """

    def __init__(
        self,
        limit: int | None = None,
        *,
        adapts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit, self._least = limit, limit
        self._adapts, self._clock = adapts, clock
        self._open: Counter[Turn] = Counter()
        self._under_way: Counter[tuple[Turn, int]] = Counter()
        self._stirred: dict[Turn, float] = {}
        self._moved, self._since = 0, 0.0
        # One thread may finish a flight while another moves the next.
        self._lock = threading.Lock()

    def begin(self, turn: Turn) -> None:
        """There is something to move for ``turn``."""
        with self._lock:
            self._open[turn] += 1

    def end(self, turn: Turn) -> None:
        """All of it has moved; once for each ``begin``."""
        with self._lock:
            self._open[turn] -= 1
            self._open += Counter()  # forgets what has come to nothing
            if turn not in self._open:
                self._stirred.pop(turn, None)

    def take(self, turn: Turn, peer: int, part: float, nbytes: int) -> bool:
        """Whether ``nbytes`` more may be under way now; they count from now on if so.

        Args:
            turn: whose message it is.
            peer: the other end.
            part: of the turn's messages that are this peer's, 0 to 1.
            nbytes: of the message.
        """
        flow = turn, peer
        with self._lock:
            if not self._under_way:
                self._since, self._moved = self._clock(), 0
            if self.limit is not None and not self._allows(flow, part, nbytes):
                return False
            self._under_way[flow] += nbytes
            self._stirred[turn] = self._clock()
            return True

    def give_back(self, turn: Turn, peer: int, nbytes: int) -> None:
        """So much has moved."""
        flow = turn, peer
        with self._lock:
            self._under_way[flow] -= nbytes
            if not self._under_way[flow]:
                del self._under_way[flow]
            self._moved += nbytes
            self._stirred[turn] = self._clock()
            if self._adapts and self._least is not None:
                passed = self._clock() - self._since
                if passed >= DELAY:
                    self.limit = max(self._least, round(self._moved / passed * DELAY))
                    self._since, self._moved = self._clock(), 0

    def _allows(self, flow: tuple[Turn, int], part: float, nbytes: int) -> bool:
        assert self.limit is not None
        turn, mine = flow[0], self._under_way[flow]
        if turn == min(self._open):
            return not mine or mine + nbytes <= self.limit * part
        if mine:
            return False
        late = self._clock() - LATE
        return all(other >= turn or self._stirred[other] < late for other, _ in self._under_way)
