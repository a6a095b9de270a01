"""The file in which a rank leaves its last transfers when a job ends badly: JSON lines.

The first line says who wrote it, why, and what the rank was doing; each further line is one event:
seconds since 1970, what, flight, stage, cell, peer, bytes. Readers trust nothing in it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gossip_hvd.errors import GossipError
from gossip_hvd.recorder import Event

FORMAT, VERSION = "gossip_hvd.record", 1
LARGEST_FILE = 1 << 26
"""Bytes; a rank's ring buffer makes less than one."""
MOST_RANKS = 1 << 20
MOST_WAITS = 1000
LARGEST_NUMBER = 1 << 62
STATES = ("computing", "waiting", "left", "paused")


class RecordError(GossipError, ValueError):
    """A file that is not a whole record; names the file and the place."""


@dataclass(frozen=True)
class WaitRecord:
    """One wait that stood when the record was written; see ``waits.Facts``."""

    text: str
    seconds: float
    peers: tuple[int, ...] = ()
    round: int = -1
    segment: str = ""


@dataclass(frozen=True)
class Record:
    """What one rank left.

    Attributes:
        rank: in the world.
        size: of the world.
        host: name of its machine.
        node: of gossip; -1 before nodes are known.
        why: what made it write.
        ended: when it wrote, seconds since 1970 by its machine's clock.
        state: one of ``STATES``.
        where: the line of the user's program that its main thread was in.
        idle: seconds since its last event; -1 where there was none.
        sent: bytes to other nodes.
        received: bytes from other nodes.
        waits: that stood.
        events: the last ones, oldest first.
    """

    rank: int
    size: int
    host: str
    node: int
    why: str
    ended: float
    state: str
    where: str
    idle: float
    sent: int
    received: int
    waits: tuple[WaitRecord, ...] = ()
    events: tuple[Event, ...] = field(default=(), compare=False)


def path_of(folder: Path, rank: int) -> Path:
    """Where a rank's record lies."""
    return folder / f"rank{rank:05d}.jsonl"


def write_record(folder: Path, record: Record, events: Iterable[Event]) -> Path:
    """Write a whole file or none, readable by its owner only.

    Args:
        folder: made where it is not there.
        record: its own events are not written.
        events: with times since 1970.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = path_of(folder, record.rank)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    head = {k: v for k, v in asdict(record).items() if k != "events"}
    lines = [json.dumps({"format": FORMAT, "version": VERSION, **head})]
    lines += [json.dumps([round(event.time, 6), *event[1:]]) for event in events]
    draft.unlink(missing_ok=True)
    try:
        # A file of our own, through nobody's link.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(draft, flags, 0o600), "w") as file:
            file.write("\n".join(lines) + "\n")
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return path


def read_record(path: Path) -> Record:
    """Read and check one file.

    Raises:
        RecordError: for anything but a whole record.
    """
    lines = _lines(path)
    head = _parsed(path, 1, lines[0])
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise RecordError(f"{path}: not a record of gossip_hvd.")
    if head.get("version") != VERSION:
        raise RecordError(
            f"{path}: a record of version {head.get('version')!r:.40}; this gossip_hvd reads "
            f"version {VERSION}. Read it with the gossip_hvd that wrote it."
        )
    made = _record(path, head)
    events = [_event(path, i, _parsed(path, i, line)) for i, line in enumerate(lines[1:], 2)]
    return Record(**{f.name: getattr(made, f.name) for f in fields(made)} | {"events": (*events,)})


def _lines(path: Path) -> list[str]:
    try:
        # Not a pipe or device, which a reader might wait for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise RecordError(f"{path}: not a file.")
            if found.st_size > LARGEST_FILE:
                raise RecordError(
                    f"{path}: {found.st_size} bytes; at most {LARGEST_FILE} expected."
                )
            data = file.read(LARGEST_FILE)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}.") from None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise RecordError(f"{path}: not text.") from None
    if not text.endswith("\n"):
        raise RecordError(f"{path}: cut short.")
    return text[:-1].split("\n")


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise RecordError(f"{path}, line {number}: not JSON.") from None


def _record(path: Path, head: dict[str, Any]) -> Record:
    try:
        size = _whole(head["size"], 1, MOST_RANKS)
        waits = _list(head["waits"], MOST_WAITS)
        return Record(
            _whole(head["rank"], 0, size - 1),
            size,
            _text(head["host"]),
            _whole(head["node"], -1, size - 1),
            _text(head["why"]),
            _number(head["ended"]),
            _one_of(head["state"], STATES),
            _text(head["where"]),
            _number(head["idle"]),
            _whole(head["sent"], 0, LARGEST_NUMBER),
            _whole(head["received"], 0, LARGEST_NUMBER),
            tuple(_wait(one, size) for one in waits),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path}, line 1: {type(error).__name__}: {error}.") from None


def _wait(found: Any, size: int) -> WaitRecord:
    return WaitRecord(
        _text(found["text"]),
        _number(found["seconds"]),
        tuple(_whole(p, 0, size - 1) for p in _list(found["peers"], size)),
        _whole(found["round"], -1, LARGEST_NUMBER),
        _text(found["segment"]),
    )


def _event(path: Path, number: int, found: Any) -> Event:
    try:
        when, what, *rest = _list(found, 7)
        flight, stage, cell, peer, nbytes = (_whole(n, -1, LARGEST_NUMBER) for n in rest)
        return Event(_number(when), _text(what), flight, stage, cell, peer, nbytes)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path}, line {number}: {type(error).__name__}: {error}.") from None


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.40} is no whole number from {least} to {most}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > LARGEST_NUMBER:
        raise ValueError(f"{value!r:.40} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    return "".join(c if c.isprintable() else " " for c in value)


def _one_of(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r:.40} is none of {', '.join(known)}")
    return str(value)


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{value!r:.40} is no list of at most {most}")
    return value
