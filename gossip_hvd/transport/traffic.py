"""How much one rank asks its peers for at once, over all its exchanges.

A link that carries several rounds, or several peers' flows, at the same time serves each of them
slowly, and what is needed first then comes last. So a receiver asks for its messages one after the
other in the order in which it needs them, with just enough under way to keep the link busy: what
the link brings in ``DELAY`` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

DELAY = 0.05
"""Seconds that a message may queue on the way; long beside the time between two polls."""


class Traffic:
    """Bytes asked for and not yet received.

    Args:
        limit: bytes under way at once, or the least of them if it adapts; one message may always
            be. None for no limit.
        adapts: whether the limit follows what the link brings.
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
        self._under_way = self._came = 0
        self._since = 0.0

    def take(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more may be asked for now; they count from now on if so."""
        if self._under_way == 0:
            self._since, self._came = self._clock(), 0
        elif self.limit is not None and self._under_way + nbytes > self.limit:
            return False
        self._under_way += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """So much has come."""
        self._under_way -= nbytes
        self._came += nbytes
        if self._adapts and self._least is not None:
            passed = self._clock() - self._since
            if passed >= DELAY:
                self.limit = max(self._least, round(self._came / passed * DELAY))
                self._since, self._came = self._clock(), 0
