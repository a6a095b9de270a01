"""The payload slots as flat bytes: what adapters promise, and the plainest way to keep it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from gossip_hvd.transport import Bytes


class Memory(Protocol):
    """An adapter's flat bytes: views of its tensors, or copies of them."""

    def __getitem__(self, slot: str) -> Bytes:
        """The bytes of one slot."""

    def items(self) -> Iterable[tuple[str, Bytes]]:
        """All slots."""

    def load(self, slots: Iterable[str]) -> None:
        """Bring tensors into the flat bytes, where those are copies."""

    def save(self, slots: Iterable[str]) -> None:
        """Bring the flat bytes back into tensors, where those are copies."""


class PlainMemory(dict[str, Bytes]):
    """Bytes that no tensor follows."""

    def load(self, slots: Iterable[str]) -> None:
        """Nothing to copy."""

    def save(self, slots: Iterable[str]) -> None:
        """Nothing to copy."""
