"""Where a thread of this process is: the user's own line, and whether a debugger holds it."""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

DEBUGGERS = ("bdb.py", "pdb.py", "pydevd.py", "pydevd_frame.py")
"""Files of Python's own debugger, and of the one that editors use."""

_OURS = str(Path(__file__).parent)
_FOREIGN = tuple({_OURS, *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib"))})


def user_line(thread: int | None = None) -> str:
    """The innermost line of the user's program in a thread; by default the main one."""
    found = ""
    for frame in _frames(thread):
        name = frame.f_code.co_filename
        found = found or f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        if not name.startswith((*_FOREIGN, "<frozen")):
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
    return found


def in_debugger() -> bool:
    """Whether the main thread stands in a Python debugger, or another program traces us."""
    if any(Path(f.f_code.co_filename).name in DEBUGGERS for f in _frames(None)):
        return True
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    return "\nTracerPid:\t0\n" not in status


def _frames(thread: int | None) -> Iterator[FrameType]:
    """From the innermost outwards."""
    main = threading.main_thread().ident
    frame = sys._current_frames().get(thread or main or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back
