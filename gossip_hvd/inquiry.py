"""What other ranks say they are doing, for a rank that waits for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gossip_hvd.letters import LetterBox
from gossip_hvd.waits import Facts

AGAIN = 2.0
"""Seconds between two questions to one rank; an answer that is twice as old counts no more."""


@dataclass
class _Peer:
    first: float
    asked: float
    heard: float = float("-inf")
    said: dict[str, Any] = field(default_factory=dict)


class Inquiry:
    """Asks ranks what they are doing, and keeps their answers while they are fresh.

    Args:
        box: carries questions.
    """

    def __init__(self, box: LetterBox) -> None:
        self._box = box
        self._peers: dict[int, _Peer] = {}

    def ask(self, ranks: Iterable[int], now: float) -> None:
        """Ask each of these ranks, unless it has just been asked."""
        for rank in ranks:
            peer = self._peers.get(rank)
            if peer is None or now - peer.first > 60 * AGAIN:
                peer = self._peers[rank] = _Peer(now, float("-inf"))
            if now - peer.asked >= AGAIN:
                peer.asked = now
                self._box.send([rank], "ask")

    def hear(self, rank: int, said: dict[str, Any], now: float) -> None:
        """An answer has come."""
        peer = self._peers.setdefault(rank, _Peer(now, now))
        peer.heard, peer.said = now, said

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

    def phrase(self, rank: int, now: float) -> str:
        """What is known of a rank, in words; empty where there was no time to ask."""
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
        peer = self._peers.get(rank)
        if peer is None or now - peer.first < AGAIN:
            return ""
        return f"Rank {rank} does not answer: it is stopped, or its host or link is gone."

    def _said(self, rank: int, now: float) -> dict[str, Any]:
        peer = self._peers.get(rank)
        return peer.said if peer is not None and now - peer.heard < 2 * AGAIN else {}
