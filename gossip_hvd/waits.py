"""Every wait of this process: announced when it begins, forgotten when it ends, for the watch.

    with waiting(subject) as wait:
        while not ready():
            wait.check()

A wait costs about a microsecond. Its subject is asked for words only when it has become long.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from gossip_hvd.errors import StallError


@dataclass(frozen=True)
class Facts:
    """What is waited for.

    Attributes:
        text: a sentence that begins with who waits.
        peers: world ranks that are waited for.
        round: of gossip; -1 elsewhere.
        segment: its name; empty elsewhere.
        key: of the model whose flight it is; empty elsewhere.
        sequence: number of that flight.
        travels: whether what is waited for may still be on its way from a peer that has left.
        known_by: world ranks that are not waited for, but know who is.
    """

    text: str
    peers: tuple[int, ...] = ()
    round: int = -1
    segment: str = ""
    key: str = ""
    sequence: int = 0
    travels: bool = False
    known_by: tuple[int, ...] = ()

    def facts(self) -> Facts:
        """A wait whose words are known from the start is its own subject."""
        return self

    def moved(self) -> int:
        """Nothing tells of progress but the end."""
        return 0


class Subject(Protocol):
    """What a wait is about; called by the watch's thread."""

    def facts(self) -> Facts:
        """Who waits for whom, now."""

    def moved(self) -> int:
        """A number that changes with every progress."""


class Wait:
    """One wait of one thread, from ``with`` to its end.

    Attributes:
        subject: what is waited for; may be replaced while the wait goes on.
        margin: seconds that it may last longer than others, which know more of what is missing.
        since: when it began, or made progress last; seconds of the monotonic clock.
        progress: what ``subject.moved()`` was then; None before the watch has looked.
        thread: that waits.
        warned: whether it has been named.
        over: why it must end, once the watch has decided so.
    """

    __slots__ = ("margin", "over", "progress", "since", "subject", "thread", "warned")

    def __init__(self, subject: Subject, margin: float = 0.0) -> None:
        self.subject, self.margin = subject, margin
        self.progress: int | None = None
        self.warned = False
        self.over: str | None = None

    def __enter__(self) -> Wait:
        self.since = time.monotonic()
        self.thread = threading.get_ident()
        _standing[id(self)] = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del _standing[id(self)]

    def check(self) -> None:
        """Return unless the wait must end; for loops that poll.

        Raises:
            StallError: names who waits for whom.
        """
        if self.over is not None:
            raise StallError(self.over)


_standing: dict[int, Wait] = {}

waiting = Wait
"""``with waiting(Facts("rank 3 waits for …")) as wait:`` announces a wait."""


def standing() -> list[Wait]:
    """The waits of this process, the oldest first."""
    return list(_standing.values())
