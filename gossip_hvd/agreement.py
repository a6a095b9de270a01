"""Compare every rank's settings before anything is exchanged: a difference is one clear error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Protocol

from gossip_hvd.errors import CheckpointError, ConfigError


class Gatherer(Protocol):
    """Gives every rank the bytes of all."""

    rank: int

    def allgather(self, data: bytes, what: str) -> list[bytes]:
        """Every rank's ``data``, by rank."""


def require_agreement(ranks: Gatherer, what: str, facts: Mapping[str, object]) -> None:
    """Raise the same error on every rank unless all ranks hold equal ``facts``.

    Args:
        ranks: all ranks; every one of them must call.
        what: what is being compared, such as ``"DistributedOptimizer"``.
        facts: by field, anything whose text is the same wherever it is equal.

    Raises:
        ConfigError: names the first rank that differs from rank 0, the field, and both values.
    """
    mine = json.dumps({key: str(value) for key, value in facts.items()}).encode()
    digests = ranks.allgather(hashlib.sha256(mine).digest(), f"comparing settings of {what}")
    if len(set(digests)) == 1:
        return
    every = [json.loads(text) for text in ranks.allgather(mine, f"settings of {what}")]
    for rank, theirs in enumerate(every):
        for field in {**every[0], **theirs}:
            here, there = every[0].get(field, "(absent)"), theirs.get(field, "(absent)")
            if here != there:
                raise ConfigError(
                    f"{what}: rank {rank} and rank 0 differ in {field}: rank {rank} has "
                    f"{there}, rank 0 has {here}. Give every rank the same settings and packages."
                )


def require_success(ranks: Gatherer, what: str, failure: str) -> None:
    """Raise the same error on every rank where any rank has failed; all must call.

    Args:
        ranks: all ranks.
        what: was done, such as ``"save_checkpoint"``.
        failure: what went wrong on this rank; empty where nothing did.

    Raises:
        CheckpointError: names the first rank that has failed.
    """
    for rank, text in enumerate(ranks.allgather(failure.encode(), what)):
        if text:
            raise CheckpointError(f"{what}: rank {rank}: {text.decode()}")
