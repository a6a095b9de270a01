"""What the set-up shows while it works: numbered steps, signs of life, a sentence on failure."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

LAST_LINES = 20
SECONDS_BETWEEN_LINES = 20.0
SECONDS_BETWEEN_REDRAWS = 1.0
SCREEN_WIDTH = 78
ERASE_LINE = "\r\033[K"


class SetupError(Exception):
    """Something the user can act on; its text is all that is shown."""


@contextmanager
def step(number: int, total: int, title: str) -> Iterator[Callable[[str], None]]:
    """Print ``[2/6] title`` now, and what came of it with the seconds it took at the end.

    Args:
        number: which step this is, from 1.
        total: how many steps there are.
        title: what the step is about.

    Yields:
        A function that takes the few words to close the step with.
    """
    results: list[str] = []
    started = time.monotonic()
    print(f"[{number}/{total}] {title}", flush=True)
    yield results.append
    print(f"      {', '.join(results)} ({time.monotonic() - started:.1f} s)", flush=True)


def run_logged(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[str], str] = lambda _: "",
    limit: float = 7200.0,
) -> None:
    """Run a command with its output in a log file, showing meanwhile that it is alive.

    Args:
        command: program and arguments.
        log: file that receives everything the command prints.
        environment: the command's environment; the caller's own if None.
        progress: turns the text of the log so far into a few words, such as a percentage.
        limit: seconds after which the command is stopped.

    Raises:
        SetupError: the command failed or took too long; the text ends with the log's last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while not _ended(process) and time.monotonic() - started < limit:
                _show_life(time.monotonic() - started, progress(_text_of(log)))
        finally:
            _stop(process)
    if process.returncode != 0:
        name = " ".join([Path(command[0]).name, *command[1:4]])
        last_lines = [f"    {line}" for line in _text_of(log).splitlines()[-LAST_LINES:]]
        raise SetupError(
            f"{name} ended with {process.returncode} after {time.monotonic() - started:.0f} s. "
            f"Its output is in {log}; the last lines are:\n" + "\n".join(last_lines)
        )


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Wait until the process ends or it is time for another sign of life."""
    try:
        process.wait(SECONDS_BETWEEN_REDRAWS if sys.stdout.isatty() else SECONDS_BETWEEN_LINES)
    except subprocess.TimeoutExpired:
        return False
    if sys.stdout.isatty():
        print(ERASE_LINE, end="", flush=True)
    return True


def _show_life(seconds: float, words: str) -> None:
    """Say how far it is: redrawn in place on a terminal, else one line more."""
    line = f"      {seconds:4.0f} s  {words}"[:SCREEN_WIDTH]
    if sys.stdout.isatty():
        print(ERASE_LINE + line, end="", flush=True)
    else:
        print(line, flush=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still running, because of its time limit or the user's Ctrl-C."""
    if process.poll() is None:
        process.terminate()
        process.wait()


def _text_of(log: Path) -> str:
    """What the command has printed so far."""
    return log.read_text(encoding="utf-8", errors="replace")
