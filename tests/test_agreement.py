"""Agreement: a difference between ranks is the same clear error on every one of them."""

from __future__ import annotations

import threading

import pytest

from gossip_hvd.agreement import require_agreement
from gossip_hvd.errors import ConfigError


class Table:
    """Where the threads of a test lay their bytes down for all to see."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.data: list[bytes] = [b""] * size
        self.calls = 0


class Seat:
    """One rank's place at the table."""

    def __init__(self, table: Table, rank: int) -> None:
        self.table, self.rank = table, rank

    def allgather(self, data: bytes, what: str) -> list[bytes]:
        assert what
        self.table.data[self.rank] = data
        self.table.barrier.wait()
        every = list(self.table.data)
        self.table.calls += self.rank == 0
        self.table.barrier.wait()
        return every


def compare(*facts: dict[str, object]) -> tuple[list[str], int]:
    """What each rank is told, "" where nothing is wrong; and how often all had to talk."""
    table, told = Table(len(facts)), ["nothing came back"] * len(facts)

    def rank_compares(rank: int) -> None:
        try:
            require_agreement(Seat(table, rank), "the test", facts[rank])
            told[rank] = ""
        except ConfigError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=rank_compares, args=(r,)) for r in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return told, table.calls


def test_equal_ranks_talk_once_and_go_on() -> None:
    assert compare(*[{"method": "crossover", "seed": 3}] * 4) == ([""] * 4, 1)
    assert compare({}, {}) == (["", ""], 1)
    assert compare({"alone": 1}) == ([""], 1)


def test_a_difference_is_one_error_on_every_rank() -> None:
    told, _ = compare({"seed": 1}, {"seed": 1}, {"seed": 7}, {"seed": 8})
    assert len(set(told)) == 1
    assert "the test: rank 2 and rank 0 differ in seed: rank 2 has 7, rank 0 has 1." in told[0]


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_it_names_rank_field_and_both_values(odd: int) -> None:
    facts: list[dict[str, object]] = [{"method": "gossip", "seed": 0} for _ in range(3)]
    facts[odd]["method"] = "crossover"
    told, _ = compare(*facts)
    first = 1 if odd == 0 else odd
    values = ("gossip", "crossover") if odd == 0 else ("crossover", "gossip")
    assert set(told) == {
        f"the test: rank {first} and rank 0 differ in method: rank {first} has {values[0]}, "
        f"rank 0 has {values[1]}. Give every rank the same settings and packages."
    }


def test_a_field_that_one_rank_lacks() -> None:
    told, _ = compare({"seed": 1, "parameter 'w'": "(3,)"}, {"seed": 1})
    assert "differ in parameter 'w': rank 1 has (absent), rank 0 has (3,)" in told[1]
    told, _ = compare({"seed": 1}, {"seed": 1, "parameter 'w'": "(3,)"})
    assert "differ in parameter 'w': rank 1 has (3,), rank 0 has (absent)" in told[0]


def test_values_are_compared_by_their_text() -> None:
    assert compare({"seed": 1}, {"seed": "1"})[0] == ["", ""]
    assert compare({"rate": 0.1}, {"rate": 0.1 + 1e-16})[0] != ["", ""]
    assert "γ" in compare({"name": "γ"}, {"name": "x"})[0][0]


def test_the_order_of_fields_does_not_matter() -> None:
    told, _ = compare({"seed": 1, "method": "gossip"}, {"method": "gossip", "seed": 1})
    assert told == ["", ""]
