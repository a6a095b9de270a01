"""What all ranks of a node must find: they merge the same rounds, or their weights would part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gossip_hvd.transport.exchange import Exchange, Message, tag_of
from gossip_hvd.waits import Facts

if TYPE_CHECKING:
    from gossip_hvd.seat import Seat


class Vote:
    """Every rank of the node says yes or no to some questions; a few bytes to each sibling.

    Args:
        seat: this rank's.
        sequence: of the flight to come, equal on all ranks.
        answers: this rank's, as many on all of them.
    """

    def __init__(self, seat: Seat, sequence: int, answers: Sequence[bool]) -> None:
        self._seat = seat
        self._rows = np.tile(np.array(answers, np.uint8), (seat.ranks, 1))
        tag, siblings = tag_of("vote", sequence, 0), seat.siblings
        mine, *theirs = self._rows
        self._exchange = Exchange(seat.wire, sequence, 0, siblings, gated=False, record=seat.record)
        pairs = zip(siblings, theirs, strict=True)
        self._exchange.receive(Message(rank, tag, row) for rank, row in pairs)
        self._exchange.send(Message(rank, tag, mine) for rank in siblings)

    @property
    def unanimous(self) -> list[bool]:
        """For each question, whether all have said yes; once ``poll`` has returned True."""
        return [all(column) for column in self._rows.T.tolist()]

    def poll(self) -> bool:
        """Move what can move; True once all have answered."""
        self._exchange.poll()
        return self._exchange.done

    def moved(self) -> int:
        """A number that changes with every event."""
        return self._seat.record.count

    def facts(self) -> Facts:
        """Who waits for whom."""
        seat = self._seat
        peers = tuple(dict.fromkeys(m.peer for _, m in self._exchange.outstanding()))
        return Facts(
            f"rank {seat.rank} (node {seat.node}) waits for ranks {list(peers)} of its node to say "
            "which exchanges have arrived",
            peers,
            key=seat.record.key,
        )
