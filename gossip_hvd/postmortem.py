"""What the records of all ranks say together: which rank stopped first, who waited for whom.

A rank that raised stopped the job. Else it is a rank that others waited for and that left no record
(it was killed, or cut off), had left, or was busy with something else; where all waited, the one
whose last transfer is oldest. Times of different hosts are never compared.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gossip_hvd.records import Record, RecordError, read_record

OTHERS = re.compile(r"rank \d+ ended the job|no progress for |SIGTERM")
"""How the reason begins where another rank, or a wait, made this one end."""

NAMED = 6
"""Waits that the sentence names."""


@dataclass(frozen=True)
class Report:
    """What happened.

    Attributes:
        first: the rank that stopped first; -1 where nothing tells.
        reason: what it did.
        sentence: both, and who waited for whom.
        records: by rank.
        missing: ranks that left no record.
        refused: files that could not be read, and why.
    """

    first: int
    reason: str
    sentence: str
    records: dict[int, Record]
    missing: tuple[int, ...]
    refused: tuple[str, ...]


def examine(folder: Path) -> Report:
    """Read all records of a folder.

    Raises:
        RecordError: where there is none that can be read.
    """
    records: dict[int, Record] = {}
    refused: list[str] = []
    for path in sorted(folder.glob("rank*.jsonl")):
        try:
            record = read_record(path)
        except RecordError as error:
            refused.append(str(error))
            continue
        if record.size != next(iter(records.values()), record).size or record.rank in records:
            refused.append(f"{path}: of another job than the others, or twice there.")
            continue
        records[record.rank] = record
    if not records:
        raise RecordError(
            f"{folder}: no record that can be read{''.join(f'; {r}' for r in refused)}. Jobs write "
            "them where GOSSIP_HVD_RECORD_DIR names a directory that every rank can write to."
        )
    size = next(iter(records.values())).size
    missing = tuple(rank for rank in range(size) if rank not in records)
    first, reason = _first(records, missing)
    sentence = _sentence(first, reason, records)
    return Report(first, reason, sentence, records, missing, tuple(refused))


def awaited(records: dict[int, Record]) -> dict[int, list[int]]:
    """For each rank, those that waited for it."""
    found: dict[int, list[int]] = {}
    for rank, record in sorted(records.items()):
        for peer in {peer for wait in record.waits for peer in wait.peers}:
            found.setdefault(peer, []).append(rank)
    return found


def _first(records: dict[int, Record], missing: tuple[int, ...]) -> tuple[int, str]:
    for rank, record in sorted(records.items(), key=lambda pair: -pair[1].idle):
        if not OTHERS.match(record.why):
            return rank, f"raised {record.why}"
    wanted = awaited(records)
    for rank in sorted(missing, key=lambda rank: rank not in wanted):
        return rank, "left no record: it was killed, or its host or link is gone"
    stopped = [r for r in records if r in wanted and records[r].state != "waiting"]
    if stopped:
        first = max(stopped, key=lambda rank: records[rank].idle)
        record = records[first]
        did = {
            "left": "had left: its program ended, or called sys.exit or shutdown",
            "paused": f"was held by a debugger at {record.where}",
        }.get(record.state, f"waited for nobody and was at {record.where}")
        return first, did
    if wanted:
        first = max(records, key=lambda rank: records[rank].idle)
        return first, "waited too, and had its last transfer the longest ago"
    return -1, ""


def _sentence(first: int, reason: str, records: dict[int, Record]) -> str:
    if first < 0:
        why = next(iter(records.values())).why
        return f"No rank waited for another; the job was ended from outside: {why}."
    where = idle = ""
    if first in records:
        record = records[first]
        where = f" (host {record.host}, node {record.node})"
        idle = f", {record.idle:.1f} s before the end" if record.idle >= 0 else ""
    waits = [
        f"rank {rank} waited {wait.seconds:.1f} s for {_ranks(wait.peers)}{_place(wait)}"
        for rank, record in sorted(records.items())
        for wait in record.waits
        if wait.peers and rank != first
    ]
    more = f"; and {len(waits) - NAMED} more" if len(waits) > NAMED else ""
    told = "".join(f"; {wait}" for wait in waits[:NAMED])
    return f"Rank {first}{where} stopped first{idle}: it {reason}{told}{more}."


def _ranks(peers: tuple[int, ...]) -> str:
    named = ", ".join(str(peer) for peer in peers[:NAMED])
    return f"rank{'s' * (len(peers) > 1)} {named}{' …' * (len(peers) > NAMED)}"


def _place(wait: Any) -> str:
    return f" (round {wait.round}, segment {wait.segment!r})" if wait.round >= 0 else ""


def as_text(report: Report) -> str:
    """The sentence, a table of all ranks, and what could not be read."""
    heads = ("rank", "host", "node", "did", "last transfer", "waited", "for", "round", "was at")
    rows = [heads, *(_row(record) for _, record in sorted(report.records.items()))]
    rows += [(str(rank), *"?" * 2, "no record", *[""] * 5) for rank in report.missing]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([report.sentence, "", *lines, *(f"refused: {r}" for r in report.refused)])


def _row(record: Record) -> tuple[str, ...]:
    wait = next((w for w in record.waits if w.peers), next(iter(record.waits), None))
    return (
        str(record.rank),
        record.host,
        str(record.node),
        record.state,
        f"{record.idle:.1f} s before" if record.idle >= 0 else "none",
        f"{wait.seconds:.1f} s" if wait else "",
        " ".join(map(str, wait.peers[:NAMED])) if wait else "",
        str(wait.round) if wait and wait.round >= 0 else "",
        record.where,
    )


def as_json(report: Report) -> str:
    """The same for programs, without the events."""
    ranks = [
        {key: value for key, value in asdict(record).items() if key != "events"}
        for _, record in sorted(report.records.items())
    ]
    rest = {key: value for key, value in vars(report).items() if key != "records"}
    return json.dumps({**rest, "ranks": ranks}, indent=1)
