"""What goes wrong on one rank ends the whole job: errors, interrupts, waits without end."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from gossip_hvd.endings import end_on_errors, record_on_sigterm
from gossip_hvd.interrupts import end_on_unheard_interrupts
from gossip_hvd.settings import setting
from gossip_hvd.watch import Patience, Watch

ABORT = 10.0
"""Seconds after which a rank leaves although MPI has not ended it."""

_latest: Watch | None = None


def guarded(MPI: Any, comm: Any) -> Watch:
    """The watch of this rank; from now on whatever goes wrong ends the whole job.

    Args:
        MPI: the module.
        comm: all ranks.
    """
    rank, folder = comm.Get_rank(), setting("RECORD_DIR")

    def end(code: int) -> None:
        # Where MPI cannot reach its launcher any more, this rank at least must go.
        leave = threading.Timer(ABORT, os._exit, [code])
        leave.daemon = True
        with suppress(RuntimeError):  # Where memory has run out there is no further thread.
            leave.start()
        if MPI.COMM_WORLD.Get_size() > 1 and not MPI.Is_finalized():
            MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    watch = Watch(
        rank,
        comm.Get_size(),
        socket.gethostname(),
        Patience(setting("STALL_WARNING"), setting("STALL_TIMEOUT")),
        end,
        None if folder is None else Path(folder),
    )

    global _latest
    _latest = watch

    def end_because(why: str, code: int) -> None:
        # Also after the last shutdown: other ranks may wait for this one at MPI's own end.
        if _latest is not None:
            _latest.ending(why)
        if MPI.COMM_WORLD.Get_size() > 1 and not MPI.Is_finalized():
            end(code)

    end_on_errors(rank, end_because)
    if folder is not None:
        # Of the latest session: handlers of signals stay when one ends and another begins.
        record_on_sigterm(lambda why: _latest is None or _latest.write(why))
    end_on_unheard_interrupts(rank, end_because)
    return watch
