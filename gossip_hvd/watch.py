"""The watch: a thread that names waits that are long, and ends the job where one is too long.

It looks at all waits twice a second. A rank that has waited for some seconds asks the peers that it
waits for what they are doing; they answer from their own watch, so a line says not only who waits
for whom but why. Where a peer has left, or the limit is past, the wait fails with ``StallError``,
and the process ends soon after, whatever becomes of that error. Every rank that can still hear is
told, and writes its last transfers.

A clock stands still while a debugger holds the rank, or one that it waits for, at any distance, and
while the whole process was stopped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossip_hvd.endings import STALLED
from gossip_hvd.frames import in_debugger, user_line
from gossip_hvd.inquiry import Inquiry
from gossip_hvd.letters import LetterBox, Letters
from gossip_hvd.recorder import Event, Recorder
from gossip_hvd.records import MOST_WAITS, Record, WaitRecord, path_of, write_record
from gossip_hvd.terminate import Terminator
from gossip_hvd.waits import Facts, Wait, standing

log = logging.getLogger("gossip_hvd")

TICK = 0.5
"""Seconds between two looks."""

ASK = 2.0
"""Seconds after which a rank asks those that it waits for."""

GONE = 5.0
"""Seconds without progress after which a wait for a rank that has left is given up."""

POLITE = 1.0
"""Seconds for which a rank whose peers wait too lets them speak first."""

GRACE = 5.0
"""Seconds that a rank may take to end once its wait has failed, or it has heard of the end."""

NOBODY = -1
"""In place of a rank that a debugger holds."""

PHRASES = 4
"""Answers that a sentence holds."""

LEAST = 1e-3
"""Seconds between two looks, however short the limits are."""


@dataclass(frozen=True)
class Patience:
    """How long a wait may be.

    Attributes:
        warn_after: seconds without progress after which a wait is named.
        stop_after: seconds after which the job ends; may be infinite.
    """

    warn_after: float
    stop_after: float


class Watch:
    """The watch of one rank.

    Args:
        rank: in the world.
        size: of the world.
        host: name of this machine.
        patience: with waits; may be changed later.
        end: ends the whole job at once, with an exit code.
        folder: where the last transfers are written; None to write none.

    Attributes:
        node: this rank's node, once known.
        left: True once this rank trains no more.
        recorders: of the models that gossip.
        terminator: of this rank, once others can be reached.
        clock: seconds that count: without those in which this process was stopped, or a debugger
            held it or an awaited rank, also at a distance.
        awaited: ranks for whom others wait by way of this one, which coordinates them.
        ask_after: seconds after which a rank that is waited for is asked.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        patience: Patience,
        end: Callable[[int], None],
        folder: Path | None = None,
    ) -> None:
        self.rank, self.size, self.host, self.patience = rank, size, host, patience
        self.node, self.left = -1, False
        self.recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()
        self._end, self._folder = end, folder
        if folder is not None:
            # Another job's record would speak for a rank of this one that is killed.
            with contextlib.suppress(OSError):
                path_of(folder, rank).unlink(missing_ok=True)
        self._box: LetterBox | None = None
        self._inquiry: Inquiry | None = None
        self.terminator: Terminator | None = None
        self._holder, self._recorded = NOBODY, False
        self._over_at: float | None = None
        # A signal may interrupt the very thread that writes.
        self._writing = threading.RLock()
        self._written = False
        self._closed = threading.Event()
        self._tick = max(LEAST, min(TICK, patience.warn_after / 4, patience.stop_after / 4))
        self.clock = 0.0
        self.awaited: tuple[int, ...] = ()
        self._thread = threading.Thread(target=self._run, name="gossip-watch", daemon=True)
        self._thread.start()

    @property
    def ask_after(self) -> float:
        """See the class."""
        return min(ASK, self.patience.warn_after, self.patience.stop_after / 2)

    def connect(self, letters: Letters) -> None:
        """From now on other ranks can be asked."""
        self._box = LetterBox(letters)
        self._inquiry = Inquiry(self._box, self.rank)
        self.terminator = Terminator(self.rank, self.size, self._box)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout=10.0)

    def ending(self, why: str) -> None:
        """This rank is about to end the job: let it and all others write their records."""
        self.write(why)
        if self._box is not None and self._folder is not None:
            self._tell_all(why)
            time.sleep(2 * TICK)

    def write(self, why: str) -> bool:
        """Write this rank's record, once.

        Returns:
            Whether nothing is left to do; False in a signal's handler that has interrupted the
            writing, which goes on when the handler returns.
        """
        with self._writing:
            if self._folder is None or self._recorded:
                return self._folder is None or self._written
            self._recorded = True
            try:
                write_record(self._folder, self._record(why), self._events())
            except OSError as error:
                log.warning("gossip_hvd: rank %d cannot write its record: %s", self.rank, error)
            finally:
                self._written = True
            return True

    def known(self, ranks: Sequence[int]) -> str:
        """What ranks that are asked have said, for a sentence; empty where nothing is known."""
        found = self._inquiry.phrases(ranks, time.monotonic()) if self._inquiry else []
        return " ".join(found[:PHRASES])

    # The thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            # A process that was stopped must not count the time in which it was.
            passed, before = now - before, now
            try:
                self._look(now, max(0.0, passed - self._tick))
                held = self._holder == self.rank or self._held_by_any(self.awaited, now)
                self.clock += 0.0 if held else min(passed, self._tick)
            except Exception:
                log.exception("gossip_hvd: rank %d: its watch failed once", self.rank)

    def _look(self, now: float, stopped: float) -> None:
        self._read(now)
        # Others have been told of the last look's holder; they ask it themselves.
        self._holder = self.rank if in_debugger() else NOBODY
        for wait in standing() if self._over_at is None else ():
            moved = wait.subject.moved()
            if wait.progress is not None and moved != wait.progress:
                wait.since, wait.warned = now, False
            wait.progress = moved
            own = self._tick if self._holder == self.rank else 0.0
            wait.since = min(now, wait.since + stopped + own)
            if now - wait.since > self.ask_after:
                self._long(wait, now)
        if self._over_at is not None and now - self._over_at > GRACE:
            self._end(STALLED)

    def _long(self, wait: Wait, now: float) -> None:
        facts = facts_of(wait)
        if facts is None:
            return
        waited, limit = now - wait.since, self.patience.stop_after + wait.margin
        gone = False
        if self._held_by_any((*facts.peers, *facts.known_by), now):
            wait.since += self._tick
        if self._inquiry is not None:
            gone = any(self._inquiry.has_left(peer, facts, now) for peer in facts.peers)
            limit += POLITE * self._inquiry.all_wait(facts.peers, now)
        given_up = max(GONE, self.patience.warn_after) if facts.travels else GONE
        if waited > limit or (gone and waited > min(given_up, limit)):
            self._fail(wait, self._sentence(facts, now, waited), now)
        elif waited > self.patience.warn_after and not wait.warned:
            wait.warned = True
            log.warning("gossip_hvd: %s", self._sentence(facts, now, waited))

    def _held_by_any(self, peers: Sequence[int], now: float) -> bool:
        """Ask whether a debugger holds one of these ranks, or one that they wait for, and so on.

        Whoever is said to be held must say so itself: two ranks that wait for each other would
        repeat for ever what they have heard.
        """
        others = [rank for rank in peers if rank != self.rank]
        if self._inquiry is None or not others:
            return False
        self._inquiry.ask(others, now)
        said = {self._inquiry.holder(peer, now) for peer in others} - {self.rank}
        holders = [rank for rank in said if 0 <= rank < self.size]
        self._inquiry.ask(holders, now)
        paused = [rank for rank in holders if self._inquiry.paused(rank, now)]
        if paused:
            self._holder = paused[0]
        return bool(paused)

    def _fail(self, wait: Wait, sentence: str, now: float) -> None:
        if self._over_at is None:
            self._over_at = now
            self._tell_all(sentence)
            self.write(sentence)
            # Also for a thread that is deep in MPI or Horovod and can raise nothing.
            log.error("gossip_hvd: %s The job ends.", sentence)
        wait.over = f"{sentence} The limit is GOSSIP_HVD_STALL_TIMEOUT seconds."

    def _sentence(self, facts: Facts, now: float, waited: float) -> str:
        phrases = self._inquiry.phrases(facts.peers, now) if self._inquiry is not None else []
        start = f"no progress for {waited:.0f} s on host {self.host}: {facts.text}."
        return " ".join([start, *phrases[:PHRASES]])

    # Other ranks -----------------------------------------------------------------------------

    def _tell_all(self, why: str) -> None:
        if self._box is not None:
            self._box.send([r for r in range(self.size) if r != self.rank], "ending", why=why)

    def _read(self, now: float) -> None:
        terminator = self.terminator
        if self._box is None or self._inquiry is None or terminator is None:
            return
        terminator.look()
        askers = []
        for sender, letter in self._box.receive():
            if letter["kind"] == "ask":
                askers.append(sender)
            elif letter["kind"] == "answer":
                self._inquiry.hear(sender, letter, now)
            elif letter["kind"] in Terminator.KINDS:
                terminator.hear(sender, letter)
            elif letter["kind"] == "ending":
                self._over_at = self._over_at or now
                self.write(f"rank {sender} ended the job: {letter.get('why', '')}")
        if askers:
            self._box.send(askers, "answer", **self._state())

    def _state(self) -> dict[str, Any]:
        waits = standing()
        facts = facts_of(waits[-1]) if waits else None
        return {
            "host": self.host,
            "state": self._state_name(),
            "holder": self.rank if in_debugger() else self._holder,
            "where": user_line(),
            "text": facts.text if facts else "",
            "sequences": {record.key: record.flights for record in self.recorders},
        }

    def _state_name(self) -> str:
        if self.left:
            return "left"
        if in_debugger():
            return "paused"
        return "waiting" if standing() else "computing"

    # The record ------------------------------------------------------------------------------

    def _record(self, why: str) -> Record:
        now = time.monotonic()
        last = [r.events[-1].time for r in self.recorders if r.events]
        waits = [(wait, facts_of(wait)) for wait in standing()[:MOST_WAITS]]
        return Record(
            self.rank,
            self.size,
            self.host,
            self.node,
            why,
            time.time(),
            self._state_name(),
            user_line(),
            now - max(last) if last else -1.0,
            sum(r.bytes_sent for r in self.recorders),
            sum(r.bytes_received for r in self.recorders),
            tuple(
                WaitRecord(facts.text, now - wait.since, facts.peers, facts.round, facts.segment)
                for wait, facts in waits
                if facts is not None
            ),
        )

    def _events(self) -> list[Event]:
        offset = time.time() - time.monotonic()
        events = [event for record in self.recorders for event in list(record.events)]
        return [event._replace(time=event.time + offset) for event in sorted(events)]


def facts_of(wait: Wait) -> Facts | None:
    """What a wait is about; None where it moved on while it was being looked at."""
    with contextlib.suppress(RuntimeError, IndexError, KeyError, AttributeError):
        return wait.subject.facts()
    return None
