"""Ranks out of data follow the steps of those that still have some, until the last has joined.

A step is one completed reduction of gradients. Every rank counts its steps and remembers which
optimizer made them; while nobody has joined, that is all. The first ``join`` makes rank 0 ask all
others to report their steps, and each step that anybody has begun is then repeated, in order, by
every rank that has joined. So all ranks make equally many steps, whatever the method.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from gossip_hvd.requests import Request

TAIL = 256
"""Steps that a rank remembers: how far a rank may be behind when it joins."""


class Steps:
    """The steps of one rank; may be used from several threads."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=TAIL)

    def add(self, key: str) -> Request:
        """One more step, by the optimizer with this key; returns the report of it."""
        with self._lock:
            self.count += 1
            self._tail.append(key)
            return Request("steps", "steps", dtypes=(key,), splits=(self.count,))

    def report(self, kind: str) -> Request:
        """All steps that are remembered, as a request of this kind."""
        with self._lock:
            tail = tuple(self._tail)
            return Request(kind, kind, dtypes=tail, splits=(self.count - len(tail) + 1,))


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

    @property
    def over(self) -> bool:
        """Whether everybody has joined."""
        return len(self.order) == self._size

    def join(self, rank: int, request: Request) -> list[int]:
        """A rank has no more data; returns the ranks that shall report from now on."""
        if rank in self.order:
            return []
        self.heard(request)
        self.order.append(rank)
        self._done[rank] = request.splits[0] + len(request.dtypes) - 1
        return [r for r in range(self._size) if r not in self.order]

    def heard(self, request: Request) -> None:
        """Some rank has begun these steps."""
        for i, key in enumerate(request.dtypes):
            self._log.setdefault(request.splits[0] + i, key)

    def following(self) -> Iterator[tuple[int, Request]]:
        """For each rank that has joined, the steps that it has not been told of."""
        for rank in self.order:
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
        if behind:
            return (
                f"join: ranks {behind} were more than {TAIL} steps behind when they joined, and "
                "cannot follow. Give ranks data of more equal length."
            )
        return ""
