"""SIGTERM, as batch systems send it: all ranks stop after the same step, save if asked, and leave.

A rank that is told to end says so to rank 0, which asks every rank for the number of the step that
it is in. The last of these is the step after which all stop; until it is known, no rank goes on
beyond the step that it has named. So nobody waits for a rank that has stopped. Letters travel with
the watch's, twice a second.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from gossip_hvd.letters import LetterBox
from gossip_hvd.waits import Facts, waiting

LOOK = 0.1
"""Seconds between two looks of a rank that waits to hear which step is the last."""

EXIT = 128 + signal.SIGTERM
"""Exit code of a rank that has ended as it was asked to."""


class Terminator:
    """The agreement of all ranks on their last step.

    Args:
        rank: in the world.
        size: of the world.
        box: carries letters; ``hear`` is given those of ``KINDS``.

    Attributes:
        step: steps that this rank has completed.
        callbacks: run after the last step, in order.
    """

    KINDS = ("terminate", "report", "within", "until")

    def __init__(self, rank: int, size: int, box: LetterBox) -> None:
        self.step = 0
        self.callbacks: list[Callable[[], None]] = []
        self._rank, self._size, self._box = rank, size, box
        self._asked = self._told = False
        self._within: dict[int, int] = {}
        self._named: int | None = None
        self._until: int | None = None
        self._moving = threading.Lock()
        self._before: Any = None

    def listen(self, callback: Callable[[], None]) -> None:
        """Take SIGTERM; ``callback`` runs after the last step. In the main thread."""
        if not self.callbacks:
            self._before = signal.signal(signal.SIGTERM, self._signalled)
        if callback not in self.callbacks:
            self.callbacks.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        """Leave SIGTERM to whoever had it before, once no callback is left; in the main thread."""
        self.callbacks.remove(callback)
        if not self.callbacks:
            signal.signal(signal.SIGTERM, self._before)

    def close(self) -> None:
        """Leave SIGTERM to whoever had it before; in the main thread."""
        if self.callbacks:
            self.callbacks.clear()
            signal.signal(signal.SIGTERM, self._before)

    def stepped(self) -> None:
        """One more step is complete on this rank.

        Raises:
            SystemExit: after the last.
        """
        with self._moving:
            self.step += 1
            named = self._named
        if named is None:
            return
        text = f"rank {self._rank} waits for all ranks to say which step they are in"
        with waiting(Facts(text)) as wait:
            while self._until is None:
                wait.check()
                threading.Event().wait(LOOK)
        if self.step >= self._until:
            for callback in self.callbacks:
                callback()
            raise SystemExit(EXIT)

    def look(self) -> None:
        """From the watch: pass on what the signal's handler has left."""
        if self._asked and not self._told:
            self._told = True
            self._send([0], "terminate")

    def hear(self, sender: int, letter: dict[str, Any]) -> None:
        """From the watch: a letter has come."""
        number = letter.get("step")
        step = number if isinstance(number, int) else 0
        match letter["kind"]:
            case "terminate" if self._rank == 0 and not self._within:
                self._within[0] = self._name()
                self._send(range(1, self._size), "report")
                self._settle()
            case "report":
                self._send([0], "within", step=self._name())
            case "within":
                self._within[sender] = step
                self._settle()
            case "until":
                self._until = step

    def _name(self) -> int:
        """The step that this rank is in; it will not go beyond."""
        with self._moving:
            self._named = self.step + 1
            return self._named

    def _settle(self) -> None:
        if len(self._within) == self._size:
            last = max(self._within.values())
            self._send(range(1, self._size), "until", step=last)
            self._until = last

    def _send(self, ranks: Any, kind: str, **content: Any) -> None:
        others = [rank for rank in ranks if rank != self._rank]
        self._box.send(others, kind, **content)
        if 0 in ranks and self._rank == 0:
            self.hear(0, {"kind": kind, **content})

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        # Letters are the watch's: the main thread may hold their lock at this moment.
        self._asked = True
