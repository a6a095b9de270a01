"""Records of last transfers: what is written is read again, and nothing else is believed."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossip_hvd.cli import main
from gossip_hvd.postmortem import as_json, as_text, examine
from gossip_hvd.recorder import Event, Recorder
from gossip_hvd.records import Record, RecordError, WaitRecord, path_of, read_record, write_record

EVENTS = [
    Event(1000.25, "post", 3, 0),
    Event(1000.5, "sent", 3, 0, 7, 1, 4096),
    Event(1001.0, "received", 3, 0, 7, 2, 4096),
]
PLAIN = Record(1, 4, "host-a", 1, "why", 1002.0, "computing", "train.py:3 in step", 1.5, 10, 20)
IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def waits(rank: int, peers: tuple[int, ...], seconds: float, **more: Any) -> WaitRecord:
    return WaitRecord(f"rank {rank} waits", seconds, peers, **more)


def leave(folder: Path, rank: int, **more: Any) -> None:
    why = "rank 0 ended the job: no progress"
    record = replace(PLAIN, **{"rank": rank, "node": rank, "why": why, **more})
    write_record(folder, record, EVENTS)


# One file --------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    record = replace(PLAIN, waits=(waits(1, (0, 2), 8.5, round=20, segment="stem"),))
    path = write_record(tmp_path / "new", record, EVENTS)
    assert path == path_of(tmp_path / "new", 1)
    found = read_record(path)
    assert found == record
    assert list(found.events) == EVENTS


def test_only_the_owner_reads_it_and_no_draft_is_left(tmp_path: Path) -> None:
    path = write_record(tmp_path / "new", PLAIN, EVENTS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == [path.name]


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = write_record(tmp_path, PLAIN, EVENTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # as a disk that becomes full
    try:
        with pytest.raises(OSError, match="too large"):
            write_record(tmp_path, replace(PLAIN, why="new"), EVENTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_record(path).why == "why"
    assert os.listdir(tmp_path) == [path.name]


def head(changes: Mapping[str, Any]) -> str:
    known = json.loads(path_text(PLAIN))
    return json.dumps({**known, **changes}) + "\n"


def path_text(record: Record) -> str:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return write_record(Path(folder), record, []).read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "cut short"),
        ("{}", "cut short"),
        ("{}\n", "not a record"),
        ("[1]\n", "not a record"),
        ("nonsense\n", "not JSON"),
        ("[" * 100_000 + "\n", "not JSON"),
        (head({"version": 2}), "version 2"),
        (head({"rank": 4}), "line 1"),
        (head({"rank": True}), "line 1"),
        (head({"size": 10**30}), "line 1"),
        (head({"idle": float("nan")}), "line 1"),
        (head({"ended": 10**400}), "line 1"),
        (head({"state": "asleep"}), "line 1"),
        (head({"waits": [{}]}), "line 1"),
        (head({"waits": [{"text": 1}]}), "line 1"),
        (head({"waits": {}}), "line 1"),
        (head({}) + "[1, 2]\n", "line 2"),
        (head({}) + '["x", "sent", 1, 1, 1, 1, 1]\n', "line 2"),
        (head({}) + '[1.0, "sent", 1, 1, 1, 1, -9]\n', "line 2"),
        (head({}) + "\n", "line 2"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, text: str, sentence: str) -> None:
    path = path_of(tmp_path, 1)
    path.write_text(text)
    with pytest.raises(RecordError, match=sentence) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_folder_a_pipe_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError):
        read_record(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordError, match="not a file"):
        read_record(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RecordError, match="at most"):
        read_record(tmp_path / "huge")


@IN_ONE_FOLDER
@given(data=st.binary(max_size=300))
def test_no_bytes_break_the_reader(tmp_path: Path, data: bytes) -> None:
    path = path_of(tmp_path, 0)
    path.write_bytes(data)
    with pytest.raises(RecordError):
        read_record(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@IN_ONE_FOLDER
@given(
    changes=st.dictionaries(st.sampled_from([*json.loads(path_text(PLAIN))]), values, min_size=1),
    event=values,
)
def test_no_value_breaks_the_reader(tmp_path: Path, changes: dict[str, Any], event: object) -> None:
    path = path_of(tmp_path, 1)
    path.write_text(head(changes) + json.dumps(event) + "\n")
    try:
        read_record(path)
    except RecordError:
        return


@IN_ONE_FOLDER
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_no_flipped_byte_breaks_the_reader(tmp_path: Path, at: int, byte: int) -> None:
    record = replace(PLAIN, waits=(waits(1, (0, 2), 8.5),))
    path = write_record(tmp_path, record, EVENTS)
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data)
    try:
        report = examine(tmp_path)
    except RecordError:
        return
    assert report.sentence
    assert as_text(report).isprintable() or "\n" in as_text(report)


kinds = st.sampled_from(["post", "word", "send", "sent", "received", "mixed", "done"])
places = st.integers(-1, 1 << 62)


@IN_ONE_FOLDER
@given(noted=st.lists(st.tuples(kinds, *[places] * 5), max_size=12), capacity=st.integers(1, 6))
def test_the_ring_holds_the_last_events_and_its_record_is_read_as_it_was(
    tmp_path: Path, noted: list[tuple[Any, ...]], capacity: int
) -> None:
    ring = Recorder(capacity)
    for one in noted:
        ring(*one)
    assert ring.count == len(noted)
    assert [event[1:] for event in ring.events] == noted[-capacity:]
    assert ring.flights == max((event.flight for event in ring.events), default=0)
    found = read_record(write_record(tmp_path, PLAIN, ring.events))
    assert [event[1:] for event in found.events] == noted[-capacity:]
    assert all(abs(a.time - b.time) < 1e-5 for a, b in zip(found.events, ring.events, strict=True))


# All of a job ----------------------------------------------------------------------------------


def test_a_busy_rank_that_all_wait_for_stopped_first(tmp_path: Path) -> None:
    leave(tmp_path, 0, state="waiting", waits=(waits(0, (1,), 8.5, round=20, segment="stem"),))
    leave(tmp_path, 1, idle=9.0)
    leave(tmp_path, 2, state="waiting", waits=(waits(2, (0,), 8.0),))
    leave(tmp_path, 3, state="waiting", idle=30.0, waits=(waits(3, (0, 2), 8.0),))
    report = examine(tmp_path)
    assert report.first == 1
    assert report.sentence == (
        "Rank 1 (host host-a, node 1) stopped first, 9.0 s before the end: it waited for nobody "
        "and was at train.py:3 in step; rank 0 waited 8.5 s for rank 1 (round 20, segment 'stem')"
        "; rank 2 waited 8.0 s for rank 0; rank 3 waited 8.0 s for ranks 0, 2."
    )
    assert len(as_text(report).splitlines()) == 7
    assert json.loads(as_json(report))["first"] == 1


@pytest.mark.parametrize(
    ("culprit", "words"),
    [
        ({"state": "left"}, "had left: its program ended"),
        ({"state": "paused"}, "was held by a debugger at train.py:3"),
        ({"why": "LookupError: no data"}, "raised LookupError: no data"),
        (None, "left no record: it was killed"),
    ],
)
def test_why_a_rank_stopped(tmp_path: Path, culprit: dict[str, Any] | None, words: str) -> None:
    for rank in (0, 1, 3):
        leave(tmp_path, rank, state="waiting", waits=(waits(rank, (2,), 8.5),))
    if culprit is not None:
        leave(tmp_path, 2, **culprit)
    report = examine(tmp_path)
    assert report.first == 2
    assert words in report.sentence


def test_where_all_wait_the_oldest_transfer_tells(tmp_path: Path) -> None:
    for rank in range(4):
        wait = waits(rank, ((rank + 1) % 4,), 8.5)
        leave(tmp_path, rank, state="waiting", idle=5.0 + (rank == 3), waits=(wait,))
    assert examine(tmp_path).first == 3


def test_foreign_files_are_told_and_do_not_matter(tmp_path: Path) -> None:
    leave(tmp_path, 0, state="waiting", waits=(waits(0, (1,), 8.5),))
    leave(tmp_path, 2, size=9)
    path_of(tmp_path, 3).write_text("nonsense")
    report = examine(tmp_path)
    assert report.first == 1
    assert len(report.refused) == 2
    assert "rank00003.jsonl: cut short" in as_text(report)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["postmortem", str(tmp_path)]) == 2
    assert "no record that can be read" in capsys.readouterr().err
    leave(tmp_path, 0, state="waiting", waits=(waits(0, (1,), 8.5),))
    assert main(["postmortem", str(tmp_path)]) == 0
    assert "Rank 1 stopped first" in capsys.readouterr().out
    assert main(["postmortem", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == [1, 2, 3]
