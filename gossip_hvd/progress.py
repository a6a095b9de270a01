"""Who moves a flight's bytes: the caller while it waits, or a thread while the caller computes.

MPI moves nothing while Python computes unless somebody polls (no background progress in Open
MPI). A flight is polled by one thread at a time; it changes hands only when nobody polls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Protocol

from gossip_hvd.flight import Flight
from gossip_hvd.waits import Facts, Subject, waiting

Steps = Iterator[Subject]
"""An operation under way: each item is what it waits for; polled by asking for the next."""

SHORTEST_PAUSE, LONGEST_PAUSE = 2e-4, 2e-3
"""Seconds between two polls: while messages complete, and after none has for a while."""

NOTHING = Facts("an exchange is being prepared")


class Progress(Protocol):
    """Moves a late flight until it has arrived."""

    def take(self, flight: Flight) -> None:
        """Look after ``flight`` from now on."""

    def arrived(self, flight: Flight) -> bool:
        """True once ``flight`` may be landed; raises what went wrong under way."""

    def release(self, flight: Flight) -> None:
        """Let go of ``flight``, arrived or not: the caller polls it from now on."""

    def close(self) -> None:
        """Stop."""


class CallerProgress:
    """Moves a flight whenever the caller asks whether it has arrived, from hooks say."""

    def take(self, flight: Flight) -> None:
        """Nothing to prepare."""

    def arrived(self, flight: Flight) -> bool:
        """Poll once."""
        if not flight.arrived:
            flight.poll()
        return flight.arrived

    def release(self, flight: Flight) -> None:
        """Nothing to let go of."""

    def close(self) -> None:
        """Nothing to stop."""


class ThreadProgress:
    """Moves flights from a thread of its own, which sleeps while nothing is in flight."""

    def __init__(self) -> None:
        self._flights: list[Flight] = []
        self._work = threading.Event()
        # Held while the thread polls: a flight changes hands between two polls.
        self._polling = threading.Lock()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="gossip-progress", daemon=True)
        self._thread.start()

    def take(self, flight: Flight) -> None:
        """Poll ``flight`` from the thread until it has arrived."""
        flight.hand_over()
        with self._polling:
            self._flights.append(flight)
            self._work.set()

    def arrived(self, flight: Flight) -> bool:
        """True once the thread has let go of the flight."""
        if self._error is not None:
            raise self._error
        return flight.arrived

    def release(self, flight: Flight) -> None:
        """Stop to poll ``flight``."""
        with self._polling:
            self._let_go(flight)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread; a flight under way is left where it is."""
        with self._polling:
            self._closed = True
            self._work.set()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        pause = SHORTEST_PAUSE
        while not self._closed:
            self._work.wait()
            with self._polling:
                moved = self._poll()
            # Fast links find something at nearly every poll; slow ones need few polls.
            pause = SHORTEST_PAUSE if moved else min(1.5 * pause, LONGEST_PAUSE)
            time.sleep(pause)

    def _poll(self) -> bool:
        """Poll every flight once; whether anything has moved."""
        flights = tuple(self._flights)
        before = [flight.moved() for flight in flights]
        try:
            for flight in flights:
                flight.poll()
                if flight.arrived:
                    self._let_go(flight)
        except BaseException as error:
            self._error = error
            self._flights.clear()
        if not self._flights:
            self._work.clear()
        return before != [flight.moved() for flight in flights]

    def _let_go(self, flight: Flight) -> None:
        if flight in self._flights:
            self._flights.remove(flight)
            flight.hand_over()


def drive(steps: Steps) -> None:
    """Run an operation to its end; the watch hears of all that it waits for.

    Raises:
        StallError: names rank, round, segment and peer of the first message that is missing.
    """
    last, pause = -1, 0.0
    with waiting(NOTHING) as wait:
        for subject in steps:
            wait.subject = subject
            count = subject.moved()
            if count != last:
                last, pause = count, 0.0
                continue
            wait.check()
            time.sleep(pause)
            pause = min(1.5 * pause + 1e-5, LONGEST_PAUSE / 4)
