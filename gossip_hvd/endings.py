"""How this rank leaves when something goes wrong: an exception nobody caught, or SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType

from gossip_hvd.errors import ConfigError, StallError

RAISED = 1
"""Exit code of a job in which a rank raised."""

STALLED = 75
"""Exit code of a job that a wait has ended; of old, "temporary failure: try again"."""

HURRY = 0.5
"""Seconds after SIGTERM after which a rank that is deep in MPI leaves anyway."""

ASKED = "SIGTERM: the launcher or the batch system asked it to end"
"""In the record of a rank that SIGTERM has ended."""

End = Callable[[str, int], None]
"""Ends the whole job: why, and with which exit code."""


def end_on_errors(rank: int, end: End) -> None:
    """One rank's uncaught exception ends the whole job, its own traceback on top.

    Args:
        rank: this rank.
        end: called once the traceback is written.
    """
    if getattr(sys.excepthook, "ends_the_job", False):
        return

    def end_the_job(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        lines = "".join(traceback.format_exception(kind, error, trace))
        if rank and issubclass(kind, ConfigError):
            # All ranks refuse a setting alike: rank 0 shows where, if it comes here within reason.
            lines = "".join(traceback.format_exception_only(kind, error))
            time.sleep(HURRY)
        sys.stdout.flush()
        sys.stderr.write(f"\ngossip_hvd: rank {rank} raised; the job ends.\n{lines}")
        sys.stderr.flush()
        why = traceback.format_exception_only(kind, error)[-1].strip()
        end(why, STALLED if issubclass(kind, StallError) else RAISED)

    end_the_job.ends_the_job = True  # type: ignore[attr-defined]
    sys.excepthook = end_the_job


def is_ours(number: int, default: object) -> bool:
    """Whether this thread may handle a signal, and no handler of the user's own does."""
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(number) is default


def signals_heard() -> tuple[int, int]:
    """A file into which Python writes every signal that comes, and where it wrote them before.

    A thread that reads it hears them also where the main thread is deep in MPI.
    """
    listening, speaking = os.pipe()
    os.set_blocking(speaking, False)
    return listening, signal.set_wakeup_fd(speaking, warn_on_full_buffer=False)


def record_on_sigterm(write: Callable[[str], bool]) -> None:
    """Let SIGTERM, by which launchers end the other ranks of a job, leave a record before it ends.

    A handler of the user's own is left alone. The main thread may be deep in MPI, where Python
    handles no signal, so a thread listens.

    Args:
        write: writes the record; False where it has interrupted its own thread at that.
    """
    if not is_ours(signal.SIGTERM, signal.SIG_DFL):
        return
    listening, before = signals_heard()
    if before != -1:
        signal.set_wakeup_fd(before)

    def leave(number: int, frame: FrameType | None) -> None:
        if not write(ASKED):
            return  # This very thread is at it. The other one ends the process behind it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def listen() -> None:
        # Whoever has taken SIGTERM over, may give it back.
        while signal.SIGTERM not in os.read(listening, 64) or (
            signal.getsignal(signal.SIGTERM) is not leave
        ):
            continue
        write(ASKED)
        time.sleep(HURRY)
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=listen, name="gossip-signals", daemon=True).start()
