"""What other ranks say they are doing, for a rank that waits for them.

Where it waits for many, it asks a few at each look, in turn, so that a rank which all wait for is
not asked by all at once, and yet everybody's answer comes in time. Whoever is held by a debugger,
or has left, is asked at every turn, since a clock, or the job's end, depends on its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from gossip_hvd.letters import LetterBox
from gossip_hvd.waits import Facts

AGAIN = 2.0
"""Seconds between two questions to one rank; an answer that is twice as old counts no more."""

FORGOTTEN = 60 * AGAIN
"""Seconds after which a question without an answer tells nothing of a new wait."""

FEW = 8
"""Ranks that are asked at one look."""


@dataclass
class _Peer:
    """A rank that has been asked: when last, since when in vain, and what it said when."""

    asked: float = float("-inf")
    silent: float | None = None
    heard: float = float("-inf")
    said: dict[str, Any] = field(default_factory=dict)


class Inquiry:
    """Asks ranks what they are doing, and keeps their answers while they are fresh.

    Args:
        box: carries questions.
        first: whose turn comes first among many; best another on each rank.
    """

    def __init__(self, box: LetterBox, first: int = 0) -> None:
        self._box, self._turn = box, first
        self._looked = float("-inf")
        self._peers: dict[int, _Peer] = {}

    def ask(self, ranks: Sequence[int], now: float) -> None:
        """Ask these ranks, or those of many whose turn it is, unless they have just been asked.

        Args:
            ranks: that are waited for.
            now: of this look; a new one makes it the next ones' turn.
        """
        if now != self._looked:
            self._looked, self._turn = now, self._turn + FEW
        chosen = list(ranks)
        if len(chosen) > FEW:
            start = self._turn % len(chosen)
            telling = [rank for rank in ranks if self._is_telling(rank, now)]
            chosen = [*chosen, *chosen][start : start + FEW] + telling[:FEW]
        for rank in chosen:
            peer = self._peers.setdefault(rank, _Peer())
            if now - peer.asked < AGAIN:
                continue
            if peer.silent is None or now - peer.asked > FORGOTTEN:
                peer.silent = now
            peer.asked = now
            self._box.send([rank], "ask")

    def hear(self, rank: int, said: dict[str, Any], now: float) -> None:
        """An answer has come."""
        peer = self._peers.setdefault(rank, _Peer())
        peer.heard, peer.said, peer.silent = now, said, None

    def holder(self, rank: int, now: float) -> int:
        """Whom that rank knows to be held by a debugger, itself perhaps; -1 where nobody."""
        found = self._said(rank, now).get("holder")
        return found if isinstance(found, int) else -1

    def paused(self, rank: int, now: float) -> bool:
        """Whether that rank itself says that a debugger holds it."""
        return bool(self._said(rank, now).get("state") == "paused")

    def all_wait(self, ranks: Iterable[int], now: float) -> bool:
        """Whether each of these ranks says that it waits too, so that others know more."""
        states = [self._said(rank, now).get("state") for rank in ranks]
        return bool(states) and all(state == "waiting" for state in states)

    def has_left(self, rank: int, facts: Facts, now: float) -> bool:
        """Whether that rank has left for good without sending what is waited for."""
        said = self._said(rank, now)
        if said.get("state") != "left":
            return False
        flown = said.get("sequences")
        last = flown.get(facts.key, 0) if facts.key and isinstance(flown, dict) else 0
        # What it sent before it left may still be under way.
        return not facts.key or not isinstance(last, int) or facts.sequence > last

    def phrases(self, ranks: Iterable[int], now: float) -> list[str]:
        """What is known of ranks, first of those that do not merely wait too.

        Nothing of those who had no time to answer, or whose turn has long been over.
        """
        known = [
            (self._said(rank, now).get("state") == "waiting", phrase)
            for rank in ranks
            if (phrase := self._phrase(rank, now))
        ]
        return [phrase for _, phrase in sorted(known, key=itemgetter(0))]

    def _phrase(self, rank: int, now: float) -> str:
        said = self._said(rank, now)
        name = f"Rank {rank} on host {said.get('host')}"
        match said.get("state"):
            case "left":
                return f"{name} has left: its program ended, or called sys.exit or shutdown."
            case "paused":
                return f"{name} is held by a debugger."
            case "waiting":
                return f"{name} waits too: {said.get('text')}."
            case "computing":
                return f"{name} waits for nobody: it is at {said.get('where')}."
        peer = self._peers.get(rank, _Peer())
        if peer.silent is None or now - peer.silent < AGAIN:
            return ""
        return f"Rank {rank} does not answer: it is stopped, or its host or link is gone."

    def _is_telling(self, rank: int, now: float) -> bool:
        """Whether a clock or an end depends on that rank's next answer."""
        return self.holder(rank, now) >= 0 or self._said(rank, now).get("state") == "left"

    def _said(self, rank: int, now: float) -> dict[str, Any]:
        peer = self._peers.get(rank)
        return peer.said if peer is not None and now - peer.heard < 2 * AGAIN else {}
