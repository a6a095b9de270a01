"""Small letters between the watches of ranks: JSON over whatever carries bytes."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from typing import Any, Protocol

log = logging.getLogger("gossip_hvd")

MOST = 1000
"""Letters that are read at once."""

LONGEST = 2000
"""Letters of a text in a letter, so that it travels at once, without a buffer at the other end."""


class Letters(Protocol):
    """Carries letters of any length between ranks; never blocks."""

    def send(self, peer: int, letter: bytes) -> None:
        """Start to send."""

    def receive(self) -> tuple[int, bytes] | None:
        """The sender and the text of one that has arrived."""


class LetterBox:
    """Letters as dictionaries; may be used from several threads."""

    def __init__(self, letters: Letters) -> None:
        self._letters, self._lock = letters, threading.Lock()

    def send(self, ranks: Iterable[int], kind: str, **content: Any) -> None:
        """Send the same to some ranks; a rank that cannot be reached hears nothing."""
        short = {k: v[:LONGEST] if isinstance(v, str) else v for k, v in content.items()}
        letter = json.dumps({"kind": kind, **short}).encode()
        with self._lock:
            for rank in ranks:
                try:
                    self._letters.send(rank, letter)
                except Exception as error:
                    log.debug("gossip_hvd: no letter reaches rank %d: %s", rank, error)

    def receive(self) -> list[tuple[int, dict[str, Any]]]:
        """What has arrived: sender and content; what is no letter of ours is dropped."""
        found: list[tuple[int, bytes]] = []
        with self._lock:
            while len(found) < MOST and (one := self._letters.receive()) is not None:
                found.append(one)
        return [(sender, content) for sender, text in found if (content := _read(text))]


def _read(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("kind"), str) else {}
