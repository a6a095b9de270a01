"""What MPI brings is compared with what was due: lengths, and tags before they are used."""

from __future__ import annotations

import time

import numpy as np
import pytest
from rank import Rank
from ranks import Job, on_ranks

from gossip_hvd import session
from gossip_hvd.errors import ConfigError, PeerLostError
from gossip_hvd.transport.mpi import MpiWire


def exchanged(rank: Rank, sent: int, due: int) -> None:
    """Rank 0 sends so many bytes, rank 1 expects so many."""
    wire: MpiWire = session.current().world.wire()
    data = np.arange(sent if rank.rank == 0 else due, dtype=np.uint8)
    verb = wire.send if rank.rank == 0 else wire.receive
    handles = [verb(1 - rank.rank, 7, data)]
    until = time.monotonic() + 30
    while not wire.test(handles):
        assert time.monotonic() < until
    assert not wire._due


@on_ranks([Job(2)])
def test_a_message_of_the_right_length_is_taken(rank: Rank) -> None:
    exchanged(rank, 100, 100)
    rank.settle()


@on_ranks([Job(2)])
def test_a_short_message_is_refused_by_name(rank: Rank) -> None:
    if rank.rank == 0:
        exchanged(rank, 64, 100)
    else:
        with pytest.raises(
            PeerLostError, match=r"expected 100 bytes from rank 0 \(tag 7\) and got 64"
        ):
            exchanged(rank, 64, 100)
    rank.settle()


@on_ranks([Job(2)])
def test_a_long_message_is_refused(rank: Rank) -> None:
    if rank.rank == 0:
        exchanged(rank, 100, 64)
    else:
        with pytest.raises(PeerLostError, match="rank 1: MPI reports a failed transfer"):
            exchanged(rank, 100, 64)
    rank.settle()


@on_ranks([Job(2)])
def test_a_tag_that_mpi_cannot_hold_is_refused(rank: Rank) -> None:
    wire = session.current().world.wire()
    wire._largest_tag = 1000
    with pytest.raises(ConfigError, match="tags end at 1000, and the model needs tag 1001"):
        wire.send(1 - rank.rank, 1001, np.zeros(1, np.uint8))
    rank.settle()
