"""Exchange and the memory wire: words gate sends, any order of delivery, one thread an exchange."""

from __future__ import annotations

import random as stdlib_random
import threading
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

from gossip_hvd.errors import PeerLostError, PlanError
from gossip_hvd.recorder import Recorder
from gossip_hvd.transport import Bytes
from gossip_hvd.transport.exchange import (
    KINDS,
    SEQUENCES,
    SLOTS,
    Exchange,
    Message,
    cell_of,
    tag_of,
)
from gossip_hvd.transport.memory import MemoryWire, Switchboard
from gossip_hvd.transport.traffic import DELAY, LATE, Traffic


def exchange_of(
    wire: Any,
    flight: int,
    stage: int,
    receives: list[Message],
    sends: list[Message] | None = None,
    coming: list[int] | None = None,
    **options: Any,
) -> Exchange:
    """An exchange that has been given all its messages, or waits for those from ``coming``."""
    sources = coming or [m.peer for m in receives]
    destinations = [m.peer for m in sends or []]
    exchange = Exchange(wire, flight, stage, sources, destinations, **options)
    exchange.receive(receives)
    exchange.send(sends or [])
    return exchange


WORD = tag_of("word", 0, 0)


@dataclass
class ScriptedWire:
    """Notes what it is asked for; a transfer completes when the test says so."""

    rank: int = 0
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    buffers: list[Bytes] = field(default_factory=list)
    completed: set[int] = field(default_factory=set)

    def send(self, peer: int, tag: int, data: Bytes) -> int:
        self.buffers.append(data)
        self.asked.append(("send", peer, tag))
        return len(self.asked) - 1

    def receive(self, peer: int, tag: int, data: Bytes) -> int:
        self.buffers.append(data)
        self.asked.append(("receive", peer, tag))
        return len(self.asked) - 1

    def test(self, handles: list[Any]) -> list[int]:
        return [i for i, handle in enumerate(handles) if handle in self.completed]

    def complete(self, *transfer: Any) -> None:
        self.completed.add(self.asked.index(transfer))

    def say(self, peer: int, tag: int, flight: int = 0) -> None:
        """The peer's word comes: it asks for the message of that tag."""
        word = tag_of("word", flight, 0)
        words = [i for i, asked in enumerate(self.asked) if asked == ("receive", peer, word)]
        at = next(i for i in words if i not in self.completed)
        self.buffers[at].view(np.int64)[:] = (tag, 0, 0)
        self.completed.add(at)

    def data_sent(self) -> list[tuple[int, int]]:
        """Peer and tag of everything sent that is no word."""
        return [(peer, tag) for verb, peer, tag in self.asked if verb == "send" and tag != WORD]


class StrictWire(MemoryWire):
    """Refuses data that comes before its receive has been posted."""

    def send(self, peer: int, tag: int, data: Bytes) -> Any:
        kind = tag // SEQUENCES % len(KINDS)
        if kind == KINDS["data"]:
            assert self._board._slots.get((self.rank, peer, tag)), "nobody waits for this data"
        return super().send(peer, tag, data)


def data(n: int = 4, value: int = 0) -> Bytes:
    return np.full(n, value, np.uint8)


def finish(exchanges: list[Exchange], seed: int, turns: int = 100_000) -> None:
    draw = stdlib_random.Random(seed)
    for _ in range(turns):
        going = [exchange for exchange in exchanges if not exchange.done]
        if not going:
            return
        draw.choice(going).poll()
    raise AssertionError([exchange.outstanding() for exchange in exchanges])


# Words -----------------------------------------------------------------------------------------


def test_a_receive_is_posted_before_its_word_is_said() -> None:
    wire = ScriptedWire()
    exchange_of(wire, 0, 0, [Message(1, 8, data()), Message(2, 9, data()), Message(1, 7, data())])
    asked = [(1, 8), (1, 7), (2, 9)]
    assert wire.asked == [
        step for peer, tag in asked for step in (("receive", peer, tag), ("send", peer, WORD))
    ]
    said = [int(b.view(np.int64)[0]) for b in wire.buffers if b.size == 24]
    assert said == [8, 7, 9]


def test_no_data_leaves_before_its_receivers_word() -> None:
    wire = ScriptedWire()
    sends = [Message(1, 8, data()), Message(2, 9, data()), Message(1, 7, data())]
    exchange = exchange_of(wire, 0, 0, [], sends)
    assert wire.asked == [("receive", 1, WORD), ("receive", 2, WORD)]
    assert exchange.poll() == []
    assert [what for what, _ in exchange.outstanding()] == ["word"] * 3

    wire.say(1, 7)
    assert exchange.poll() == []
    assert wire.asked[2:] == [("receive", 1, WORD), ("send", 1, 7)], "what was asked for"
    wire.say(2, 9)
    wire.say(1, 8)
    exchange.poll()
    assert sorted(wire.data_sent()) == [(1, 7), (1, 8), (2, 9)]
    assert [what for what, _ in exchange.outstanding()] == ["send"] * 3


def test_a_word_may_come_before_its_message_is_there() -> None:
    wire = ScriptedWire()
    exchange = Exchange(wire, 0, 0, [], [1])
    wire.say(1, 8)
    exchange.poll()
    assert wire.data_sent() == []
    assert not exchange.done
    exchange.send([Message(1, 8, data())])
    assert wire.data_sent() == [(1, 8)]


def test_an_ungated_exchange_sends_at_once_and_says_nothing() -> None:
    wire = ScriptedWire()
    exchange = exchange_of(
        wire, 0, 0, [Message(1, 8, data())], [Message(2, 9, data())], gated=False
    )
    assert wire.asked == [("receive", 1, 8), ("send", 2, 9)]
    exchange.send([Message(3, 9, data())])
    assert wire.asked[2:] == [("send", 3, 9)]


@pytest.mark.parametrize("asks", [1, 3, None])
def test_traffic_bounds_the_bytes_that_are_asked_for_at_once(asks: int | None) -> None:
    wire = ScriptedWire()
    receives = [Message(1, tag, data()) for tag in range(10, 18)]
    exchange = exchange_of(wire, 0, 0, receives, asking=Traffic(asks and 4 * asks))
    for turn in range(9):
        posted = [tag for verb, _, tag in wire.asked if verb == "receive"]
        assert posted == [*range(10, min(18, 10 + turn + (asks or 8)))]
        assert len(exchange.outstanding()) == 8 - turn
        if turn < 8:
            wire.complete("receive", 1, 10 + turn)
            assert [m.tag for _, m in exchange.poll()] == [10 + turn]


def asked(wire: ScriptedWire) -> list[int]:
    return [tag for verb, _, tag in wire.asked if verb == "receive"]


def test_a_younger_exchange_takes_what_the_older_leaves() -> None:
    wire, traffic = ScriptedWire(), Traffic(18)
    old = [Message(1, tag, data(6)) for tag in (10, 11, 12, 13)]
    young = [Message(1, tag, data(6)) for tag in range(20, 30)]
    first = exchange_of(wire, 3, 0, [], asking=traffic, coming=[1] * 4)
    second = exchange_of(wire, 4, 0, young, asking=traffic)
    assert asked(wire) == [20], "the older asks for nothing yet"
    first.receive(old)
    assert asked(wire) == [20, 10, 11, 12]
    wire.complete("receive", 1, 20)
    second.poll()
    assert asked(wire) == [20, 10, 11, 12], "not while the older has something under way"
    for tag in (10, 11, 12, 13):
        wire.complete("receive", 1, tag)
        first.poll()
    second.poll()
    assert asked(wire) == [20, 10, 11, 12, 13, 21, 22, 23], "now it is the oldest"


def test_a_younger_flight_moves_while_the_olders_peers_are_late() -> None:
    now = [0.0]
    traffic = Traffic(2, clock=lambda: now[0])
    for flight in (0, 1):
        traffic.begin((flight, 0))
    assert traffic.take((0, 0), 1, 1.0, 1)
    assert not traffic.take((1, 0), 2, 1.0, 1)
    now[0] += LATE / 2
    assert traffic.take((0, 0), 1, 1.0, 1), "the clock runs from the last that was asked for"
    now[0] += 0.9 * LATE
    assert not traffic.take((1, 0), 2, 1.0, 1)
    now[0] += 0.2 * LATE
    assert traffic.take((1, 0), 2, 1.0, 1)
    assert not traffic.take((1, 0), 2, 1.0, 1), "one message of a flow"
    traffic.give_back((1, 0), 2, 1)
    traffic.give_back((0, 0), 1, 1)
    assert not traffic.take((1, 0), 2, 1.0, 1), "the older has come to life"


def test_every_peer_has_its_part_and_a_silent_one_delays_no_other() -> None:
    wire, traffic = ScriptedWire(), Traffic(40)
    few = [Message(2, tag, data(5)) for tag in range(4)]
    many = [Message(1, tag, data(5)) for tag in range(10, 22)]
    exchange = exchange_of(wire, 0, 0, [*few, *many], asking=traffic)
    assert sorted(asked(wire)) == [0, 1, *range(10, 16)], "a quarter and three quarters"
    for tag in range(10, 16):
        wire.complete("receive", 1, tag)
        exchange.poll()
    assert sorted(asked(wire)) == [0, 1, *range(10, 22)]


def test_one_message_of_every_flow_may_always_go() -> None:
    wire, traffic = ScriptedWire(), Traffic(5)
    exchange_of(wire, 0, 0, [Message(1, 8, data(100)), Message(1, 9, data(4))], asking=traffic)
    assert asked(wire) == [8]
    exchange_of(wire, 0, 1, [Message(2, 9, data(100)), Message(3, 9, data(4))], asking=Traffic(5))
    assert asked(wire) == [8, 9, 9]


def test_what_is_sent_keeps_to_the_same_rule() -> None:
    wire, traffic = ScriptedWire(), Traffic(6)
    exchanges = []
    for flight in range(2):
        goes = [Message(1 + flight, tag, data(2)) for tag in range(8)]
        exchanges.append(exchange_of(wire, flight, 0, [], goes, sending=traffic))
    for tag in range(8):
        for flight, exchange in enumerate(exchanges):
            wire.say(1 + flight, tag, flight)
            exchange.poll()
    assert wire.data_sent() == [(1, 0), (1, 1), (1, 2)]
    assert [what for what, _ in exchanges[1].outstanding()] == ["send"] * 8
    for tag in range(8):
        wire.complete("send", 1, tag)
        exchanges[0].poll()
    exchanges[1].poll()
    assert wire.data_sent()[8:] == [(2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize(("rate", "limit"), [(1e3, 100), (4e4, 2_000), (1e6, 50_000)])
def test_traffic_follows_what_the_link_moves(rate: float, limit: int) -> None:
    now = [0.0]
    traffic = Traffic(100, adapts=True, clock=lambda: now[0])
    fixed = Traffic(100, clock=lambda: now[0])
    chunk = round(rate * DELAY / 10)
    for each in (traffic, fixed):
        each.begin((0, 0))
        each.take((0, 0), 1, 1.0, 1)  # never idle
    for _ in range(25):
        now[0] += DELAY / 10
        for each in (traffic, fixed):
            each.take((0, 0), 2, 1.0, chunk)
            each.give_back((0, 0), 2, chunk)
    assert traffic.limit == pytest.approx(limit, rel=0.02)
    assert fixed.limit == 100


def test_poll_reports_each_message_once_and_done_comes_last() -> None:
    wire = ScriptedWire()
    comes, goes = Message(1, 8, data(), "in"), Message(2, 9, data(), "out")
    exchange = exchange_of(wire, 0, 0, [comes], [goes])
    wire.say(2, 9)
    assert exchange.poll() == []
    wire.complete("receive", 1, 8)
    assert exchange.poll() == [("receive", comes)]
    assert exchange.poll() == []
    assert not exchange.done
    wire.complete("send", 2, 9)
    assert exchange.poll() == [("send", goes)]
    assert not exchange.done, "the word to rank 1 has not left"
    assert exchange.outstanding() == [], "but nobody waits for it"
    wire.complete("send", 1, WORD)
    assert exchange.poll() == []
    assert exchange.done


def test_an_exchange_of_nothing_is_done() -> None:
    exchange = exchange_of(ScriptedWire(), 0, 0, [])
    assert exchange.done
    assert exchange.poll() == []
    assert exchange.outstanding() == []


def test_events_and_bytes_are_recorded() -> None:
    board, records = Switchboard(2, slowest=0), [Recorder(), Recorder()]
    exchanges = [
        exchange_of(
            board.wire(me),
            5,
            1,
            [Message(1 - me, 8, data(100 + me), cell=3)],
            [Message(1 - me, 8, data(101 - me), cell=4)],
            record=records[me],
        )
        for me in range(2)
    ]
    finish(exchanges, 0)
    for me, record in enumerate(records):
        assert (record.bytes_sent, record.bytes_received) == (101 - me, 100 + me)
        events = [(e.what, e.cell, e.peer) for e in record.events]
        assert events[0] == ("post", -1, -1)
        assert set(events[1:]) == {
            ("word", 0, 1 - me),
            ("send", 4, 1 - me),
            ("sent", 4, 1 - me),
            ("received", 3, 1 - me),
        }
        assert events.index(("word", 0, 1 - me)) < events.index(("send", 4, 1 - me))
        assert {(e.flight, e.stage) for e in record.events} == {(5, 1)}
        assert [e.time for e in record.events] == sorted(e.time for e in record.events)


def test_a_recorder_keeps_the_last_events_and_counts_all() -> None:
    record = Recorder(capacity=3)
    for flight in range(10):
        record("post", flight, 0)
    assert [e.flight for e in record.events] == [7, 8, 9]
    assert record.count == 10


# Tags ------------------------------------------------------------------------------------------


def test_tags_that_may_meet_differ() -> None:
    slots = range(SLOTS)
    tags = {
        tag_of(kind, flight, stage, cell, slot)
        for kind, flight, stage, cell, slot in product(
            KINDS, range(SEQUENCES // 2), range(2), range(3), slots
        )
    }
    assert len(tags) == len(KINDS) * SEQUENCES * 3 * SLOTS
    assert tag_of("data", 3, 1, 2, 1) == tag_of("data", 3 + SEQUENCES // 2, 1, 2, 1)
    assert cell_of(tag_of("note", 7, 1, 1234, 3)) == 1234
    assert tag_of("gather", SEQUENCES, 1, 2**22, SLOTS - 1) < 2**31


# Delivery --------------------------------------------------------------------------------------


class TwoStages:
    """Everybody sends to everybody, twice; a rank begins the second time as soon as it can."""

    def __init__(self, ranks: int, seed: int) -> None:
        self.board = Switchboard(ranks, seed=seed, slowest=seed % 12)
        self.draw = stdlib_random.Random(seed)
        self.limit = self.draw.choice([None, 1, 9])
        self.pairs = [(a, b) for a, b in product(range(ranks), repeat=2) if a != b]
        self.stage = [0] * ranks
        self.inbox: dict[tuple[int, int, int, int], Bytes] = {}
        self.exchanges = [self.begin(rank) for rank in range(ranks)]

    @staticmethod
    def value(source: int, target: int, cell: int, stage: int) -> int:
        return 1 + source + 5 * target + 25 * cell + 100 * stage

    def begin(self, me: int) -> Exchange:
        at, receives, sends = self.stage[me], [], []
        for (a, b), cell in product(self.pairs, range(2)):
            tag, size = tag_of("data", 0, at, cell), 1 + a + 2 * b + 4 * cell
            if b == me:
                self.inbox[a, b, cell, at] = data(size)
                receives.append(Message(a, tag, self.inbox[a, b, cell, at]))
            if a == me:
                sends.append(Message(b, tag, data(size, self.value(a, b, cell, at))))
        self.draw.shuffle(sends)
        wire = StrictWire(me, self.board)
        limits = {"asking": Traffic(self.limit), "sending": Traffic(self.limit)}
        return exchange_of(wire, 0, at, receives, sends, **limits)

    def run(self) -> None:
        for _ in range(10_000):
            going = [me for me, stage in enumerate(self.stage) if stage < 2]
            if not going:
                return
            me = self.draw.choice(going)
            self.exchanges[me].poll()
            if self.exchanges[me].done:
                self.stage[me] += 1
                if self.stage[me] < 2:
                    self.exchanges[me] = self.begin(me)
        raise AssertionError([exchange.outstanding() for exchange in self.exchanges])


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_order_of_delivery_brings_every_byte(ranks: int) -> None:
    for seed in range(1500):
        both = TwoStages(ranks, seed)
        both.run()
        assert both.board.idle()
        assert len(both.inbox) == len(both.pairs) * 4
        assert all((got == both.value(*at)).all() for at, got in both.inbox.items()), seed


def test_the_wire_reads_the_senders_buffer_only_on_delivery() -> None:
    """So a test notices whoever overwrites memory that is still being sent."""
    board = Switchboard(2, slowest=0)
    sending, receiving = data(4, 1), data(4)
    goes = board.wire(0).send(1, 0, sending)
    assert board.wire(0).test([goes]) == []
    sending[...] = 2
    comes = board.wire(1).receive(0, 0, receiving)
    assert board.wire(1).test([comes]) == [0]
    assert board.wire(0).test([goes]) == [0]
    assert (receiving == 2).all()


def test_messages_of_one_tag_keep_their_order() -> None:
    for seed in range(200):
        board = Switchboard(2, seed=seed, slowest=9)
        sender, receiver = board.wire(0), board.wire(1)
        boxes = [data(1) for _ in range(5)]
        for i in range(5):
            sender.send(1, 3, data(1, i))
        handles: list[Any] = [receiver.receive(0, 3, box) for box in boxes]
        for _ in range(100):
            receiver.test(handles)
        assert [int(box[0]) for box in boxes] == list(range(5))
        assert board.idle()


def test_seeds_decide_the_order_of_delivery() -> None:
    def order(seed: int) -> list[int]:
        board = Switchboard(2, seed=seed, slowest=6)
        handles: list[Any] = [board.wire(1).receive(0, tag, data(1)) for tag in range(6)]
        for tag in range(6):
            board.wire(0).send(1, tag, data(1))
        arrived: list[int] = []
        while len(arrived) < 6:
            arrived += [i for i in board.wire(1).test(handles) if i not in arrived]
        return arrived

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(50)}) > 20


def test_lengths_that_differ_are_named() -> None:
    board = Switchboard(2, slowest=0)
    receiving = exchange_of(board.wire(1), 0, 0, [Message(0, 8, data(100))])
    sending = exchange_of(board.wire(0), 0, 0, [], [Message(1, 8, data(99))])
    with pytest.raises(
        PeerLostError, match=r"rank 1 expected 100 bytes from rank 0 \(tag 8\) and got 99"
    ):
        finish([receiving, sending], 0)


# Threads ---------------------------------------------------------------------------------------


def poll_elsewhere(exchange: Exchange) -> BaseException | None:
    """What another thread's poll raises."""
    raised: list[BaseException] = []

    def poll() -> None:
        try:
            exchange.poll()
        except AssertionError as error:
            raised.append(error)

    thread = threading.Thread(target=poll)
    thread.start()
    thread.join(10)
    return raised[0] if raised else None


def test_a_second_thread_may_not_poll() -> None:
    exchange = exchange_of(ScriptedWire(), 0, 0, [Message(1, 8, data())])
    exchange.poll()
    error = poll_elsewhere(exchange)
    assert isinstance(error, AssertionError)
    assert str(threading.get_ident()) in str(error)
    exchange.poll()


def test_an_exchange_changes_hands_when_it_is_handed_over() -> None:
    exchange = exchange_of(ScriptedWire(), 0, 0, [Message(1, 8, data())])
    exchange.poll()
    exchange.hand_over()
    assert poll_elsewhere(exchange) is None
    with pytest.raises(AssertionError, match="owns"):
        exchange.poll()


def test_posting_alone_owns_nothing() -> None:
    """The main thread posts; the polling thread is the first to poll."""
    exchange = exchange_of(ScriptedWire(), 0, 0, [Message(1, 8, data())], [Message(1, 8, data())])
    assert poll_elsewhere(exchange) is None


def test_all_subsets_of_completed_transfers_are_followed_up() -> None:
    """Whatever completes together, in whatever positions, the right messages are reported."""
    for count in range(5):
        for together in combinations(range(4), count):
            wire = ScriptedWire()
            messages = [Message(1, tag, data(), tag) for tag in range(4)]
            exchange = exchange_of(wire, 0, 0, messages, gated=False)
            for tag in together:
                wire.complete("receive", 1, tag)
            assert [m.key for _, m in exchange.poll()] == list(together)
            left = [m.key for _, m in exchange.outstanding()]
            assert left == [tag for tag in range(4) if tag not in together]


def test_ranks_that_exchange_for_different_ends_find_out() -> None:
    """One averages while the other mixes: the same tags and sizes, and another meaning."""
    board = Switchboard(2, seed=1)
    data = np.arange(8, dtype=np.uint8)
    exchanges = []
    for me, purpose in enumerate([(20, "mix"), (20, "mean")]):
        exchange = Exchange(board.wire(me), 3, 0, [1 - me], [1 - me], purpose=purpose)
        exchange.receive([Message(1 - me, 64, data.copy())])
        exchange.send([Message(1 - me, 64, data.copy())])
        exchanges.append(exchange)
    with pytest.raises(
        PlanError, match=r"rank 0 is in round 20 \(mix\), and rank 1 in round 20 of"
    ):
        for _ in range(100):
            exchanges[0].poll()
