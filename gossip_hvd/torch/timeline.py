"""``start_timeline`` and ``stop_timeline``: Horovod's, one file a Horovod."""

from __future__ import annotations

import horovod.torch as horovod

from gossip_hvd import session


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Record Horovod's activity; needs ``HOROVOD_TIMELINE=DYNAMIC``, as with Horovod.

    In scope ``node`` every node has a Horovod of its own. Node 0 writes to ``file_path``, node k
    to ``file_path`` with ``.node<k>`` behind it.
    """
    current = session.current()
    if current.scope == "node" and current.node:
        file_path = f"{file_path}.node{current.node}"
    horovod.start_timeline(file_path, mark_cycles)


def stop_timeline() -> None:
    """Stop recording and close the file."""
    horovod.stop_timeline()
