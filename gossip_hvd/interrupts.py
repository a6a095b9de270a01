"""An interrupt that the main thread cannot hear, since it waits deep in MPI, Horovod or TensorFlow.

Python handles signals in its main thread, between two of its own instructions. So a thread listens
too: where a wait that stood when SIGINT came still stands a little later, and Python has not heard
of it, the job ends. A main thread that computes is left alone: it hears of it soon.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from gossip_hvd.endings import RAISED, End, is_ours, signals_heard
from gossip_hvd.waits import Wait, standing

UNHEARD = 2.0
"""Seconds after which an interrupt will not be heard any more."""


class _PutOff:
    """Within it the main thread's interrupts wait for its end, which must come soon.

    Where the user has a handler of their own, that one still comes at once.
    """

    def __init__(self) -> None:
        self._active = self._came = False

    def __enter__(self) -> None:
        self._active = threading.current_thread() is threading.main_thread()

    def __exit__(self, *_: object) -> None:
        self._active = False
        if self._came:
            self._came = False
            raise KeyboardInterrupt

    def delays(self) -> bool:
        """From the handler: whether this interrupt will be raised later."""
        self._came = self._came or self._active
        return self._active


_put_off = _PutOff()


def put_off() -> _PutOff:
    """For the few lines that an interrupt must not part; one thread at a time, and not nested."""
    return _put_off


def end_on_unheard_interrupts(rank: int, end: End) -> None:
    """From now on an interrupt ends the job also where the main thread is deep in a wait.

    A handler of the user's own is left alone.

    Args:
        rank: this rank.
        end: called once the reason is written.
    """
    if not is_ours(signal.SIGINT, signal.default_int_handler):
        return
    listening, before = signals_heard()
    # What a child hears is not for us.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    heard = threading.Event()

    def hear(number: int, frame: FrameType | None) -> None:
        heard.set()
        if not _put_off.delays():
            signal.default_int_handler(number, frame)

    def listen() -> None:
        while said := os.read(listening, 64):
            if before != -1:
                with suppress(OSError):  # Whoever listened before us still does.
                    os.write(before, said)
            if signal.SIGINT in said and signal.getsignal(signal.SIGINT) is hear:
                threading.Thread(target=look, args=[standing()], daemon=True).start()

    def look(stood: Sequence[Wait]) -> None:
        time.sleep(UNHEARD)
        still = [wait for wait in standing() if wait in stood]
        if still and not heard.is_set():
            sys.stderr.write(
                f"\ngossip_hvd: rank {rank} was interrupted; the job ends. "
                f"{still[-1].subject.facts().text}, and cannot break off.\n"
            )
            sys.stderr.flush()
            end("KeyboardInterrupt", RAISED)
        heard.clear()

    signal.signal(signal.SIGINT, hear)
    threading.Thread(target=listen, name="gossip-interrupts", daemon=True).start()
