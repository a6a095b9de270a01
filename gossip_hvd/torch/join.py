"""``join`` and ``barrier``: where ranks wait for each other."""

from __future__ import annotations

import horovod.torch as horovod

from gossip_hvd import session
from gossip_hvd.torch.process_sets import (
    ProcessSet,
    global_process_set,
    horovod_set,
    number_of,
)


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when every rank of the process set has come here, or has joined."""
    inside = horovod_set(process_set)
    if inside is not None:
        horovod.barrier(inside)
        return
    operations = session.current().operations
    operations.submit("barrier", None, members=number_of(process_set)).wait()


def join(device: int = -1) -> int:
    """Say that this rank is out of data, and wait until every rank has said so.

    Args:
        device: Horovod's argument.

    Returns:
        The rank that came last.
    """
    if session.current().scope == "world":
        return int(horovod.join(device))
    handle = session.current().operations.submit("join", "join")
    handle.wait()
    assert handle.response is not None
    return handle.response.rows[0][0]
