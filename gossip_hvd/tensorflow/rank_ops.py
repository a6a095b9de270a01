"""Who is who, as tensors: Horovod's operations for graphs that ask for their rank.

The number of ranks never changes while a job runs, so these are constants.
"""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from gossip_hvd import ranks, session

WORLD = 0
"""The number of the process set that everybody is in."""


def rank_op(name: str | None = None) -> Any:
    """This rank in the world."""
    return tf.constant(ranks.rank(), tf.int32, name=name)


def size_op(process_set_id: int = WORLD, name: str | None = None) -> Any:
    """The number of ranks of the world, or of one of Horovod's process sets."""
    if process_set_id != WORLD:
        return horovod.size_op(process_set_id, name)
    return tf.constant(ranks.size(), tf.int32, name=name)


def local_rank_op(name: str | None = None) -> Any:
    """This rank among those of its machine."""
    return tf.constant(ranks.local_rank(), tf.int32, name=name)


def local_size_op(name: str | None = None) -> Any:
    """The number of ranks on this machine."""
    return tf.constant(ranks.local_size(), tf.int32, name=name)


def process_set_included_op(process_set_id: int = WORLD, name: str | None = None) -> Any:
    """1 where this rank is in one of Horovod's process sets, else 0 or Horovod's error code."""
    if process_set_id != WORLD:
        return horovod.process_set_included_op(process_set_id, name)
    return tf.constant(1, tf.int32, name=name)


def is_homogeneous() -> bool:
    """Whether every machine has the same number of ranks."""
    hosts = session.current().world.hosts
    return len({hosts.count(host) for host in hosts}) == 1
