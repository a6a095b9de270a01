"""Start a program on real ranks with a time limit, and leave no process behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "GOSSIP_TEST_LAUNCH"
"""Every process of a launch inherits this variable, whatever its parent or process group is."""

ROOT = Path(__file__).resolve().parent.parent

LAUNCHERS = {
    "mpirun": ["mpirun", "--bind-to", "none", "--oversubscribe", "-np"],
    "horovodrun": ["horovodrun", "-np"],
    "horovodrun --gloo": ["horovodrun", "--gloo", "-np"],
    "torchrun": ["torchrun", "--standalone", "--no-python", "--nproc-per-node"],
    "python": [],
}

QUIET = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "GOSSIP_HVD_STALL_TIMEOUT": "120",
}


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes:
        code: exit status of the launcher; None where the limit had to end it.
        seconds: from start to end.
        out: standard output of all ranks.
        err: standard error of all ranks.
        left: processes that outlived their launcher, and were ended by us.
    """

    code: int | None
    seconds: float
    out: str
    err: str
    left: tuple[int, ...]

    @property
    def text(self) -> str:
        """Everything that was printed."""
        return f"{self.out}\n{self.err}"


def launch(
    program: Path | str,
    ranks: int,
    *arguments: str,
    launcher: str = "mpirun",
    limit: float = 60.0,
    environ: Mapping[str, str] | None = None,
    patience: float = 3.0,
) -> Outcome:
    """Run a Python program on ``ranks`` ranks until it ends, or the limit ends it.

    Args:
        program: a file, or the program itself.
        ranks: number of processes.
        arguments: of the program.
        launcher: one of ``LAUNCHERS``; ``"python"`` for one process.
        limit: seconds.
        environ: further variables.
        patience: seconds for which processes may outlive the launcher.
    """
    mark = uuid.uuid4().hex
    python = [sys.executable, *([str(program)] if isinstance(program, Path) else ["-c", program])]
    command = [*LAUNCHERS[launcher], *([] if launcher == "python" else [str(ranks)]), *python]
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    started = time.monotonic()
    job = subprocess.Popen(
        [*command, *arguments],
        env={
            **os.environ,
            **QUIET,
            "PATH": binaries,
            "PYTHONPATH": path,
            **(environ or {}),
            MARK: mark,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_in_the_child,
    )
    code: int | None
    try:
        out, err = job.communicate(timeout=limit)
        code = job.returncode
    except subprocess.TimeoutExpired:
        _end(processes(mark))
        out, err = job.communicate()
        code = None
    except BaseException:
        _end(processes(mark))
        raise
    return Outcome(code, time.monotonic() - started, out, err, _left(mark, patience))


def _in_the_child() -> None:
    """Tell Linux to end the launcher, and so its ranks, where the tests themselves are killed."""
    # What a shell runs in the background ignores interrupts, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def processes(mark: str) -> tuple[int, ...]:
    """Process ids that carry the mark of one launch."""
    needle = f"{MARK}={mark}".encode()
    return tuple(int(p.name) for p in Path("/proc").glob("[0-9]*") if needle in _environ(p))


def _left(mark: str, patience: float) -> tuple[int, ...]:
    """What is still there a moment after the launcher has gone; ended by us."""
    until = time.monotonic() + patience
    while (left := processes(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    _end(left)
    return left


def _end(ids: Sequence[int]) -> None:
    for process in ids:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _environ(process: Path) -> bytes:
    try:
        if "\nState:\tZ" in (process / "status").read_text():
            return b""
        return (process / "environ").read_bytes()
    except OSError:
        return b""
