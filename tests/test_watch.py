"""The watch in one process: limits, progress, clocks that stand still, and an end that is sure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gossip_hvd import watch as watch_module
from gossip_hvd.endings import STALLED
from gossip_hvd.errors import StallError
from gossip_hvd.letters import LetterBox
from gossip_hvd.recorder import Recorder
from gossip_hvd.records import path_of, read_record
from gossip_hvd.waits import Facts, standing, waiting
from gossip_hvd.watch import Patience, Watch


class Ended:
    """The exit code that the watch would end the job with."""

    def __init__(self) -> None:
        self.code: int | None = None

    def __call__(self, code: int) -> None:
        self.code = code


@contextmanager
def watched(warn: float, stop: float, folder: Path | None = None) -> Iterator[tuple[Watch, Ended]]:
    ended = Ended()
    made = Watch(0, 2, "here", Patience(warn, stop), ended, folder)
    try:
        yield made, ended
    finally:
        made.close()


def wait_until(what: object, seconds: float) -> None:
    """Wait, as the library does, until ``what`` is set or the watch objects."""
    assert isinstance(what, threading.Event)
    with waiting(Facts("rank 0 waits for the test", (1,))) as wait:
        until = time.monotonic() + seconds
        while not what.is_set() and time.monotonic() < until:
            wait.check()
            time.sleep(0.005)


never = threading.Event()


def test_a_wait_past_the_limit_fails_with_its_own_words() -> None:
    with watched(9, 0.1), pytest.raises(StallError, match=r"on host here: rank 0 waits for the te"):
        wait_until(never, 10)
    assert not standing()


def test_a_long_wait_is_named_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with watched(0.05, 60):
        wait_until(never, 0.5)
    named = [r for r in caplog.records if "rank 0 waits for the test" in r.getMessage()]
    assert len(named) == 1


class Moving:
    """A subject that makes progress whenever it is looked at."""

    count = 0

    def facts(self) -> Facts:
        return Facts("rank 0 moves")

    def moved(self) -> int:
        self.count += 1
        return self.count


def test_progress_starts_the_clock_again() -> None:
    with watched(9, 0.1), waiting(Moving()) as wait:
        time.sleep(0.6)
        wait.check()


def test_a_wait_may_have_a_margin() -> None:
    with watched(9, 0.1), waiting(Facts("rank 0 joins"), margin=float("inf")) as wait:
        time.sleep(0.6)
        wait.check()


def test_a_process_that_stays_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is swallowed, or a thread that is deep in MPI, changes nothing."""
    monkeypatch.setattr(watch_module, "GRACE", 0.2)
    with watched(9, 0.1) as (_, ended), waiting(Facts("rank 0 is deep in MPI")):
        time.sleep(1.0)
    assert ended.code == STALLED


def test_a_debugger_stops_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "in_debugger", lambda: True)
    with watched(9, 0.1):
        wait_until(never, 0.6)


def test_a_rank_writes_its_record_once(tmp_path: Path) -> None:
    recorder = Recorder(key="model")
    recorder("sent", 4, 0, 1, 1, 64)
    with watched(9, 0.1, tmp_path) as (made, _):
        made.recorders.add(recorder)
        with pytest.raises(StallError):
            wait_until(never, 10)
        made.write("another reason")
    found = read_record(path_of(tmp_path, 0))
    assert found.why.startswith("no progress for 0 s on host here: rank 0 waits for the test")
    assert [event.what for event in found.events] == ["sent"]
    assert abs(found.events[0].time - time.time()) < 60
    assert (found.state, found.waits[0].peers) == ("waiting", (1,))
    assert "test_watch.py" in found.where


def test_an_old_record_does_not_speak_for_a_new_job(tmp_path: Path) -> None:
    path_of(tmp_path, 0).write_text("old")
    with watched(9, 9, tmp_path):
        assert not path_of(tmp_path, 0).exists()


class Mail:
    """Letters that go round in one process."""

    def __init__(self) -> None:
        self.boxes: dict[int, list[tuple[int, bytes]]] = {0: [], 1: []}

    def of(self, rank: int) -> MailBox:
        return MailBox(self, rank)


class MailBox:
    def __init__(self, mail: Mail, rank: int) -> None:
        self.mail, self.rank = mail, rank

    def send(self, peer: int, letter: bytes) -> None:
        self.mail.boxes[peer].append((self.rank, letter))

    def receive(self) -> tuple[int, bytes] | None:
        box = self.mail.boxes[self.rank]
        return box.pop(0) if box else None


@pytest.mark.parametrize("letter", [b"", b"[]", b"{}", b'{"kind": 3}', b"\xff", b"[" * 100_000])
def test_what_is_no_letter_is_dropped(letter: bytes) -> None:
    mail = Mail()
    mail.of(1).send(0, letter)
    LetterBox(mail.of(1)).send([0], "ask", text="x" * 10_000)
    found = LetterBox(mail.of(0)).receive()
    assert [(sender, content["kind"]) for sender, content in found] == [(1, "ask")]
    assert len(found[0][1]["text"]) < 3000


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"state": "computing", "where": "train.py:9"}, "Rank 1 on host far waits for nobody: it "),
        ({"state": "waiting", "text": "for rank 7"}, "Rank 1 on host far waits too: for rank 7"),
        ({"state": "left"}, "Rank 1 on host far has left"),
        (None, "Rank 1 does not answer"),
    ],
)
def test_the_peer_is_asked_and_its_answer_is_told(said: dict[str, str] | None, words: str) -> None:
    mail = Mail()
    with watched(60, 5) as (made, _):
        made.connect(mail.of(0))
        peer = LetterBox(mail.of(1))

        def answer() -> None:
            for _ in range(200):
                if said and any(c["kind"] == "ask" for _, c in peer.receive()):
                    peer.send([0], "answer", host="far", **said)
                time.sleep(0.05)

        threading.Thread(target=answer, daemon=True).start()
        since = time.monotonic()
        with pytest.raises(StallError, match=words):
            wait_until(never, 30)
        assert time.monotonic() - since < 20


def test_who_is_asked_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    mail = Mail()
    with watched(0.4, 60) as (made, _):
        made.connect(mail.of(0))
        LetterBox(mail.of(1)).send([0], "ask")
        time.sleep(0.5)
    (sender, content), *_ = LetterBox(mail.of(1)).receive()
    assert (sender, content["kind"], content["state"]) == (0, "answer", "computing")
    assert "test_watch.py" in content["where"]
