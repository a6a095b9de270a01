"""A ring shuffle over the ranks of the running job, whatever framework the samples are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossip_hvd import session
from gossip_hvd.agreement import require_agreement
from gossip_hvd.shuffle import RingShuffle


def ring_of(
    shard: Sequence[NDArray[np.uint8]], kinds: Sequence[Any], batch: int, seed: int
) -> RingShuffle:
    """This rank's shard in the ring of all; it is emptied and stopped by ``shutdown``.

    Args:
        shard: see ``RingShuffle``.
        kinds: what each of its arrays is, in words that must be equal on all ranks.
        batch: samples in a batch.
        seed: of the order of samples.

    Raises:
        ConfigError: on every rank, where shards differ in size or kind.
    """
    current = session.current()
    facts: dict[str, object] = {"batch_size": batch, "seed": seed, "arrays": len(shard)}
    facts |= {f"array {i} of this rank's samples": str(kind) for i, kind in enumerate(kinds)}
    require_agreement(current.world, "RingShuffledDataset", facts)
    ring = RingShuffle(shard, batch, current.world.wire(), current.world.size, seed)
    ring.start()
    current.closers.append(ring.close)
    return ring
