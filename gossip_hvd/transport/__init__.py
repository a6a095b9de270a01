"""How bytes travel between ranks: the ``Wire`` contract and the exchange that every wire shares.

A wire knows three verbs: send, receive, test. ``mpi`` puts them on MPI point-to-point, ``memory``
on queues between virtual ranks of one process. Everything else (who may send when, what is still
outstanding) is in ``exchange.py`` and the same for both.
"""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

Bytes = NDArray[Any]
"""A contiguous 1-D ``uint8`` view."""

PAUSE = 2e-4
"""Seconds between two looks at transfers of which none had moved."""


class Wire(Protocol):
    """Point-to-point messages between the ranks of one job; never blocks.

    Messages of one (sender, receiver, tag) arrive in the order in which they were sent. Buffers
    belong to the wire from the call until ``test`` has reported the handle.
    """

    rank: int

    def send(self, peer: int, tag: int, data: Bytes) -> Any:
        """Start to send ``data`` to world rank ``peer``; returns a handle."""

    def receive(self, peer: int, tag: int, data: Bytes) -> Any:
        """Start to receive from world rank ``peer`` into ``data``; returns a handle."""

    def test(self, handles: list[Any]) -> list[int]:
        """The positions in ``handles`` of transfers that have just completed."""
