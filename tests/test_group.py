"""Collectives of a process set on two levels, on real ranks whose hosts are called as we like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rank import Rank
from ranks import Job, on_ranks

from gossip_hvd.mixing import dtype_of
from gossip_hvd.reductions import combine
from gossip_hvd.transport import mpi
from gossip_hvd.transport.group import LARGE, Group

HOSTS = {
    1: ["a"],
    2: ["aa", "ab"],
    4: ["aabb", "abab", "abbb", "abcd", "aaab"],
    5: ["aabbb", "abcab", "aaaaa", "abcde", "bbbba"],
}
"""By number of ranks, on which host each of them is."""

LENGTHS = (0, 1, 7, 3001, 70_001)
OPS = ("sum", "min", "max", "product")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8", "bool")


def groups(me: Rank) -> Iterator[Group]:
    module = mpi.start()
    for hosts in HOSTS[me.size]:
        group = Group(module, module.COMM_WORLD.Dup(), hosts)
        yield group
        group.free()


def values(rank: int, length: int, dtype: str) -> NDArray[Any]:
    """Small whole numbers, whose sums and products are exact in any order."""
    random = np.random.default_rng(rank)
    return random.integers(1, 3, length).astype(dtype_of(dtype))


def reduced(ranks: Sequence[int], length: int, dtype: str, op: str) -> NDArray[Any]:
    out = np.empty(length, dtype_of(dtype))
    combine(op, [values(rank, length, dtype) for rank in ranks], out)
    return out


JOBS = [Job(ranks) for ranks in HOSTS]


@on_ranks(JOBS, bare=True)
def test_allreduce(me: Rank) -> None:
    for group in groups(me):
        for length in LENGTHS:
            for dtype in DTYPES:
                for op in OPS if length < 10_000 else ("sum",):
                    found, source = (values(me.rank, length, dtype) for _ in range(2))
                    group.allreduce(found, op)
                    expected = reduced(range(me.size), length, dtype, op)
                    assert np.array_equal(found, expected), (length, dtype, op)
                    found.fill(0)
                    group.allreduce(found, op, source)
                    assert np.array_equal(found, expected), (length, dtype, op)
                    assert np.array_equal(source, values(me.rank, length, dtype)), "it was changed"


@on_ranks(JOBS, bare=True)
def test_a_large_allreduce_goes_around_the_hosts(me: Rank) -> None:
    for group in groups(me):
        for dtype in ("float32", "float64", "int32", "bfloat16"):
            kind = dtype_of(dtype)
            chunk = LARGE // kind.itemsize
            for length in (3 * chunk - 1, 5 * chunk + 3):
                for op in ("sum", "max") if dtype == "float32" else ("sum",):
                    found, source = (values(me.rank, length, dtype) for _ in range(2))
                    expected = reduced(range(me.size), length, dtype, op)
                    group.allreduce(found, op)
                    assert np.array_equal(found, expected), (length, dtype, op)
                    found.fill(0)
                    group.allreduce(found, op, source)
                    assert np.array_equal(found, expected), (length, dtype, op)
                    assert np.array_equal(source, values(me.rank, length, dtype)), "it was changed"


@on_ranks(JOBS, bare=True)
def test_allreduce_gives_every_rank_the_same_bits(me: Rank) -> None:
    for group in groups(me):
        for length in (5, 40_001, 400_001):
            for dtype in ("float32", "float16", "complex64"):
                found = np.random.default_rng(me.rank).normal(size=length).astype(dtype)
                group.allreduce(found, "sum")
                assert len(set(me.gather(found.tobytes()))) == 1


@on_ranks(JOBS, bare=True)
def test_reduce_scatter(me: Rank) -> None:
    for group in groups(me):
        for length in (me.size, 3001, 70_001):
            cuts = [length * i // me.size for i in range(me.size + 1)]
            for dtype in ("float32", "bfloat16", "int64"):
                rows = values(me.rank, length, dtype)
                found = group.reduce_scatter(rows, cuts, "sum")
                expected = reduced(range(me.size), length, dtype, "sum")
                assert np.array_equal(found, expected[cuts[me.rank] : cuts[me.rank + 1]])
                assert np.array_equal(rows, values(me.rank, length, dtype))


@on_ranks(JOBS, bare=True)
def test_broadcast(me: Rank) -> None:
    for group in groups(me):
        for length in LENGTHS:
            for root in range(me.size):
                found = values(me.rank, length, "uint8")
                group.broadcast(found, root)
                assert np.array_equal(found, values(root, length, "uint8"))


@on_ranks(JOBS, bare=True)
def test_allgather_of_uneven_numbers(me: Rank) -> None:
    for group in groups(me):
        for width in (1, 12, 30_000):
            counts = [3 * rank % 4 for rank in range(me.size)]
            rows = [values(rank, count * width, "uint8") for rank, count in enumerate(counts)]
            found = group.allgather(rows[me.rank], width, counts)
            assert np.array_equal(found, np.concatenate(rows))


@on_ranks(JOBS, bare=True)
def test_alltoall_of_uneven_numbers(me: Rank) -> None:
    for group in groups(me):
        for width in (1, 12, 30_000):
            splits = [[(a + 2 * b) % 4 for b in range(me.size)] for a in range(me.size)]
            rows = [values(a, sum(split) * width, "uint8") for a, split in enumerate(splits)]
            found = group.alltoall(rows[me.rank], width, splits)
            expected = []
            for theirs, split in zip(rows, splits, strict=True):
                cuts = [0, *accumulate(split)]
                expected.append(theirs[cuts[me.rank] * width : cuts[me.rank + 1] * width])
            assert np.array_equal(found, np.concatenate(expected))


@on_ranks([Job(5)], bare=True)
def test_part_of_a_group(me: Rank) -> None:
    for group in groups(me):
        chosen = [4, 1, 2]
        if me.rank in chosen:
            part = group.part(chosen)
            assert (part.rank, part.size) == (chosen.index(me.rank), 3)
            for length in (3, 70_001):
                found = values(me.rank, length, "float32")
                part.allreduce(found, "sum")
                assert np.array_equal(found, reduced(chosen, length, "float32", "sum"))
            part.barrier()
            part.free()
