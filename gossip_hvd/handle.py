"""One named operation that has been asked for, and the wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from gossip_hvd.mixing import Array
from gossip_hvd.requests import Request, Response
from gossip_hvd.waits import Facts, waiting

MARGIN = 5.0
"""Seconds by which the coordinator, which knows who is missing, gives up before who waits."""

LOOK = 0.25
"""Seconds between two looks of a waiting thread at whether it must give up."""


class Handle:
    """One operation that has been asked for.

    Args:
        request: what is asked for.
        rank: this rank.
        known_by: the ranks that know whom it waits for.
        work: called by ``wait``, to do its part of the operation while it can.

    Attributes:
        request: what was asked for.
        results: flat arrays, once it is done; for operations whose outputs were given, those.
        response: how it was agreed, once it is done.
    """

    def __init__(
        self,
        request: Request,
        rank: int,
        known_by: Callable[[], tuple[int, ...]],
        work: Callable[[Handle], None] | None = None,
    ) -> None:
        self.request, self._rank, self._known_by, self._work = request, rank, known_by, work
        self.results: list[Array] = []
        self.response: Response | None = None
        self._error: BaseException | None = None
        self._done = False
        self._ending = threading.Lock()  # Held until the end: an Event costs five times as much.
        self._ending.acquire()

    @property
    def done(self) -> bool:
        """Whether ``wait`` would return, or raise, at once."""
        return self._done

    def wait(self) -> list[Array]:
        """The results, once they are there.

        Raises:
            OperationError: on every rank, where ranks asked for different things.
            StallError: past the limit; the coordinator, which knows more, gives up before.
        """
        if not self._done:
            with waiting(self, MARGIN) as wait:
                if self._work is not None:
                    self._work(self)
                while not self._done:
                    if self._ending.acquire(timeout=LOOK):
                        self._ending.release()  # Others may wait too.
                    else:
                        wait.check()
        if self._error is not None:
            raise self._error
        return self.results

    def facts(self) -> Facts:
        """Who waits for what."""
        text = f"rank {self._rank} waits for {self.request.kind} {self.request.name!r}"
        return Facts(text, known_by=self._known_by())

    def moved(self) -> int:
        """Nothing tells of progress but the end."""
        return 0

    def finish(self, response: Response, results: list[Array]) -> None:
        """Wake up whoever waits."""
        self.response, self.results = response, results
        self._end()

    def fail(self, error: BaseException) -> None:
        """Wake up whoever waits, with an error."""
        self._error = error
        self._end()

    def _end(self) -> None:
        self._done = True
        self._ending.release()
