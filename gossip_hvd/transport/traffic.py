"""How much one rank has under way on its link at once, over all its exchanges.

A link that several flows share serves each of them slowly, and what is late then delays the
most; so a receiver asks for little at a time, and a sender sends little at a time, in the order
in which the values are needed.
"""

from __future__ import annotations


class Allowance:
    """Bytes that may be under way at once; one message always may.

    Args:
        limit: bytes; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._used = 0

    def take(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more may be under way now; they count from now on if so."""
        if self._limit is not None and self._used and self._used + nbytes > self._limit:
            return False
        self._used += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """So much is under way no more."""
        self._used -= nbytes


class Traffic:
    """One rank's traffic with other nodes.

    Args:
        sent: bytes that it sends at once; None for no limit.
        asked: bytes that it asks its peers for at once; None for no limit.
    """

    def __init__(self, sent: int | None = None, asked: int | None = None) -> None:
        self.sent, self.asked = Allowance(sent), Allowance(asked)
