"""Ranks out of data follow the steps of those that still have some, until the last has joined.

A step is one completed reduction of gradients. Every rank counts its steps and remembers which
optimizer made them; while nobody has joined, that is all. The first ``join`` makes rank 0 ask all
others to report their steps, and each step that anybody has begun is then repeated, in order, by
every rank that has joined. So all ranks make equally many steps, whatever the method.

Ranks that have data know who has joined after which step, and say so with their reports; nobody
follows before all have. So whoever completes a step together with one that follows knows that.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from gossip_hvd.requests import Request

TAIL = 256
"""Steps that a rank remembers: how far a rank may be behind when it joins."""


class Steps:
    """The steps of one rank; may be used from several threads.

    Attributes:
        count: how many there are.
        joined: the last step of each rank that is known to have joined.
    """

    def __init__(self) -> None:
        self.count = 0
        self.joined: dict[int, int] = {}
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=TAIL)

    def add(self, key: str) -> Request:
        """One more step, by the optimizer with this key; returns the report of it."""
        with self._lock:
            self.count += 1
            self._tail.append(key)
            return Request("steps", "steps", dtypes=(key,), splits=(self.count, len(self.joined)))

    def report(self, kind: str) -> Request:
        """All steps that are remembered, as a request of this kind."""
        with self._lock:
            tail = tuple(self._tail)
            first = self.count - len(tail) + 1
            return Request(kind, kind, dtypes=tail, splits=(first, len(self.joined)))

    def note(self, watch: Request) -> Request:
        """Some rank has joined; returns the report that confirms it."""
        rank, last = watch.splits
        with self._lock:
            self.joined[rank] = last
        return self.report("steps")


class Joining:
    """Who has joined and which steps there are, as rank 0 knows it.

    Args:
        size: number of ranks.

    Attributes:
        order: the ranks that have joined, in the order in which they did.
    """

    def __init__(self, size: int) -> None:
        self.order: list[int] = []
        self._size = size
        self._log: dict[int, str] = {}
        self._done: dict[int, int] = {}
        self._confirmed: dict[int, int] = {}

    @property
    def over(self) -> bool:
        """Whether everybody has joined."""
        return len(self.order) == self._size

    def join(self, rank: int, request: Request) -> list[tuple[int, Request]]:
        """A rank has no more data; returns what to tell the ranks that have some."""
        if rank in self.order:
            return []
        self.heard(rank, request)
        self.order.append(rank)
        self._done[rank] = last = request.splits[0] + len(request.dtypes) - 1
        watch = Request("watch", "watch", splits=(rank, last))
        return [(other, watch) for other in self._busy()]

    def heard(self, rank: int, request: Request) -> None:
        """A rank has begun these steps, and knows of so many that have joined."""
        first, *known = request.splits
        self._confirmed[rank] = sum(known)
        for i, key in enumerate(request.dtypes):
            self._log.setdefault(first + i, key)

    def following(self) -> Iterator[tuple[int, Request]]:
        """For each rank that has joined, the steps that it has not been told of."""
        known = min((self._confirmed.get(rank, 0) for rank in self._busy()), default=self._size)
        for rank in self.order[:known]:
            while (key := self._log.get(self._done[rank] + 1)) is not None:
                self._done[rank] += 1
                yield rank, Request("steps", key, splits=(self._done[rank],))

    def finish(self) -> str:
        """Forget everything; returns what went wrong."""
        last = max(self._log, default=0)
        behind = [rank for rank, done in self._done.items() if done < last]
        self.order.clear()
        self._log.clear()
        self._done.clear()
        self._confirmed.clear()
        if behind:
            return (
                f"join: ranks {behind} were more than {TAIL} steps behind when they joined, and "
                "cannot follow. Give ranks data of more equal length."
            )
        return ""

    def _busy(self) -> list[int]:
        """The ranks that have not joined."""
        return [rank for rank in range(self._size) if rank not in self.order]
