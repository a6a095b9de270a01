"""The watch in one process: limits, progress, clocks that stand still, and an end that is sure."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import launch

from gossip_hvd import watch as watch_module
from gossip_hvd.endings import STALLED
from gossip_hvd.errors import StallError
from gossip_hvd.inquiry import FEW, Inquiry
from gossip_hvd.letters import LetterBox
from gossip_hvd.recorder import Recorder
from gossip_hvd.records import path_of, read_record
from gossip_hvd.terminate import Terminator
from gossip_hvd.waits import Facts, standing, waiting
from gossip_hvd.watch import TICK, Patience, Watch


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


@pytest.mark.parametrize("travels", [False, True])
def test_a_wait_for_one_that_has_left_goes_on_while_data_may_still_travel(
    travels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "GONE", 0.1)
    mail = Mail()
    with watched(60, 300) as (made, _):
        made.connect(mail.of(0))
        peer = LetterBox(mail.of(1))
        with waiting(Facts("rank 0 waits", (1,), travels=travels)) as wait:
            wait_for(lambda: bool(peer.receive()))
            peer.send([0], "answer", host="far", state="left")
            wait_for(lambda: "has left" in made.known([1]))
            if travels:
                time.sleep(3 * TICK)
                wait.check()
            else:
                wait_for(lambda: wait.over is not None)


def test_who_is_asked_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    mail = Mail()
    with watched(0.4, 60) as (made, _):
        made.connect(mail.of(0))
        LetterBox(mail.of(1)).send([0], "ask")
        time.sleep(0.5)
    (sender, content), *_ = LetterBox(mail.of(1)).receive()
    assert (sender, content["kind"], content["state"]) == (0, "answer", "computing")
    assert "test_watch.py" in content["where"]


plain: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
said = st.fixed_dictionaries(
    {"kind": st.sampled_from(["answer", *Terminator.KINDS])},
    optional={
        "state": st.sampled_from(["left", "paused", "waiting", "computing"]) | plain,
        "sequences": st.dictionaries(st.just("model"), plain) | plain,
        **dict.fromkeys(("host", "holder", "where", "text", "step"), plain),
    },
)


@given(st.binary(max_size=60) | said.map(lambda found: json.dumps(found).encode()))
def test_no_letter_breaks_the_watch(letter: bytes) -> None:
    mail = Mail()
    box = LetterBox(mail.of(0))
    inquiry, terminator = Inquiry(box), Terminator(0, 2, box)
    mail.of(1).send(0, letter)
    for sender, content in box.receive():
        inquiry.hear(sender, content, 1.0)
        facts = Facts("", (1,), key="model", sequence=3)
        assert type(inquiry.holder(1, 1.0)) in (int, bool)
        assert inquiry.has_left(1, facts, 1.0) in (True, False)
        assert inquiry.all_wait([1], 1.0) in (True, False)
        assert inquiry.paused(1, 1.0) in (True, False)
        assert all(isinstance(phrase, str) for phrase in inquiry.phrases([1], 1.0))
        if content["kind"] in Terminator.KINDS:
            terminator.hear(sender, content)


# Many peers --------------------------------------------------------------------------------------


class Asked:
    """Letters of one rank: those that it sends are counted, and answered as each peer would."""

    def __init__(self, answers: dict[int, dict[str, object]]) -> None:
        self.answers, self.count = answers, Counter[int]()
        self.box = LetterBox(self)

    def send(self, peer: int, letter: bytes) -> None:
        self.count[peer] += 1

    def receive(self) -> tuple[int, bytes] | None:
        return None

    def look(self, inquiry: Inquiry, ranks: Sequence[int], now: float) -> set[int]:
        """One look of the watch; returns who was asked."""
        before = Counter(self.count)
        inquiry.ask(ranks, now)
        asked = set(self.count - before)
        for rank in asked & set(self.answers):
            inquiry.hear(rank, self.answers[rank], now)
        return asked


def test_of_many_peers_a_few_are_asked_at_each_look_and_everybody_in_turn() -> None:
    ranks = range(1, 101)
    mail = Asked({rank: {"state": "waiting", "host": "h"} for rank in ranks})
    inquiry = Inquiry(mail.box, 5)
    looks = [mail.look(inquiry, ranks, 0.5 * i) for i in range(13)]
    assert set().union(*looks) == set(ranks)
    assert max(map(len, looks)) == FEW
    assert max(mail.count.values()) <= 2


def test_two_waits_of_one_look_skip_nobody() -> None:
    mail = Asked({})
    inquiry = Inquiry(mail.box)
    for i in range(40):
        mail.look(inquiry, range(16), float(i))
        mail.look(inquiry, range(100, 200), float(i))
    assert set(mail.count) == {*range(16), *range(100, 200)}


@pytest.mark.parametrize("said", [{"state": "left"}, {"state": "waiting", "holder": 7}])
def test_whose_answer_decides_is_asked_at_every_turn(said: dict[str, object]) -> None:
    """An answer is good for four seconds only, and a turn around all takes longer."""
    ranks = range(400)
    mail = Asked({300: {"host": "far", **said}})
    inquiry = Inquiry(mail.box)
    heard = [
        inquiry.phrases([300], 0.5 * i)
        for i in range(200)
        if mail.look(inquiry, ranks, 0.5 * i) or True
    ]
    first = next(i for i, found in enumerate(heard) if found)
    assert first < 52
    assert all(found and "far" in found[0] for found in heard[first:])


def test_who_merely_waits_is_named_last_and_whose_turn_is_over_is_not_called_silent() -> None:
    ranks = range(24)
    answers: dict[int, dict[str, object]] = {
        rank: {"state": "waiting", "host": "h", "text": ""} for rank in ranks if rank != 9
    }
    mail = Asked(answers | {20: {"state": "computing", "host": "h", "where": "train.py:9"}})
    inquiry = Inquiry(mail.box)
    for i in range(12):
        mail.look(inquiry, ranks, 0.5 * i)
    first, second, *rest = inquiry.phrases(ranks, 6.0)
    assert {first.split()[1], second.split()[1]} == {"9", "20"}
    assert "Rank 9 does not answer" in f"{first} {second}"
    assert all("waits too" in phrase for phrase in rest)
    assert inquiry.phrases(ranks, 60.0) == [
        "Rank 9 does not answer: it is stopped, or its host or link is gone."
    ]


# Clocks ------------------------------------------------------------------------------------------


def test_the_clock_counts_neither_the_time_that_a_process_was_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is measured here but what a stopped clock would show."""
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: float(next(hours)))
    with watched(9, 0.4) as (made, _):
        wait_for(lambda: made.clock > 0.3)
        assert made.clock < 1.0


def test_the_clock_stands_still_while_a_debugger_holds_this_rank_or_an_awaited_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mail, held = Mail(), True
    monkeypatch.setattr(watch_module, "in_debugger", lambda: held)
    with watched(9, 0.1) as (made, _):
        made.connect(mail.of(0))
        wait_for(lambda: made._holder == 0)
        before = made.clock
        time.sleep(0.3)
        assert made.clock <= before + 0.05
        held, made.awaited = False, (1,)
        peer = LetterBox(mail.of(1))
        wait_for(lambda: bool(peer.receive()))
        peer.send([0], "answer", host="far", state="paused", holder=1)
        wait_for(lambda: made._holder == 1)
        before = made.clock
        time.sleep(0.3)
        assert made.clock <= before + 0.05


def wait_for(ready: Callable[[], bool]) -> None:
    until = time.perf_counter() + 20
    while not ready():
        assert time.perf_counter() < until, "never came"
        time.sleep(0.005)


# SIGTERM while a record is written ---------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
from gossip_hvd import records, watch
from gossip_hvd.endings import record_on_sigterm
real = records.write_record
def slow(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        threading.Event().wait(1e-5)  # Python runs the handler here.
    return real(*arguments)
watch.write_record = slow
one = watch.Watch(0, 1, "here", watch.Patience(60, 300), os._exit, Path(sys.argv[1]))
record_on_sigterm(one.write)
one.write("the first reason")
signal.pause()
"""


def test_sigterm_while_the_record_is_written_waits_for_it_and_ends_the_process(
    tmp_path: Path,
) -> None:
    outcome = launch(INTERRUPTED, 1, str(tmp_path), launcher="python", limit=30)
    assert outcome.code in (143, -15), outcome
    assert read_record(path_of(tmp_path, 0)).why == "the first reason"
    assert [p.name for p in tmp_path.iterdir()] == ["rank00000.jsonl"]
