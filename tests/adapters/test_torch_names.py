"""Every name of ``horovod.torch`` that carries tensors, in both scopes."""

from __future__ import annotations

import importlib
import inspect
import operator
import time

import horovod.torch as horovod
import numpy as np
import pytest
import torch
from rank import Rank
from ranks import Job, on_ranks

import gossip_hvd.torch as hvd

MANY = [Job(1), Job(1, "world"), Job(2), Job(4, "node", 2), Job(4, "world", 2)]
NODES = [Job(1), Job(2), Job(4, "node", 2)]
HOROVODS = (
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
)
EVERY = (*HOROVODS, torch.bfloat16)


def test_no_name_is_missing_and_arguments_are_horovods() -> None:
    for name in dir(horovod):
        theirs = getattr(horovod, name)
        if name.startswith("_") or name == "check_extension":
            continue
        if inspect.ismodule(theirs) and name != "elastic":
            continue
        ours = getattr(hvd, name)
        assert name in hvd.__all__
        if not inspect.isfunction(theirs) or name in ("init", "shutdown"):
            continue
        arguments = list(inspect.signature(theirs).parameters.values())
        mine = list(inspect.signature(ours).parameters.values())
        assert [p.name for p in mine[: len(arguments)]] == [p.name for p in arguments], name
        for one, other in zip(arguments, mine, strict=False):
            known = isinstance(one.default, int | float | str | type(None))
            assert not known or one.default == other.default, (name, one.name)


MODULES = (
    "compression",
    "elastic",
    "elastic.sampler",
    "elastic.state",
    "functions",
    "mpi_ops",
    "optimizer",
    "sync_batch_norm",
)


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_scripts_import_from_have_their_names(module: str) -> None:
    theirs = vars(importlib.import_module(f"horovod.torch.{module}"))
    ours = vars(importlib.import_module(f"gossip_hvd.torch.{module}"))
    wanted = {
        name
        for name, value in theirs.items()
        if getattr(value, "__module__", None) == f"horovod.torch.{module}"
        # mpi_ops has classes of its own for autograd, such as HorovodAllreduce.
        and not name.startswith(("_", "Horovod"))
    }
    if module == "mpi_ops":
        wanted |= theirs.keys() & set(hvd.__all__)
    assert wanted - {"get_average_backwards_compatibility_fun"} <= ours.keys()
    for name in wanted & set(hvd.__all__):
        assert ours[name] is getattr(hvd, name)
    assert operator.attrgetter(module)(hvd).__name__ == f"gossip_hvd.torch.{module}"


def rows(rank: int, dtype: torch.dtype = torch.float32, first: int = 3) -> torch.Tensor:
    random = np.random.default_rng([3, rank])
    return torch.from_numpy(random.integers(0, 4, (first, 2))).to(dtype)


@on_ranks(MANY)
def test_allreduce_in_all_its_forms(me: Rank) -> None:
    every = torch.stack([rows(rank, torch.float64) for rank in range(me.size)])
    expected = {hvd.Sum: every.sum(0), hvd.Min: every.amin(0), hvd.Max: every.amax(0)}
    expected[hvd.Product] = every.prod(0)
    for dtype in EVERY:
        for op, values in expected.items():
            if op == hvd.Product and dtype == torch.int8:
                continue
            mine, other = rows(me.rank, dtype), rows(me.rank, dtype)
            results = [
                hvd.allreduce(mine, op=op),
                hvd.synchronize(hvd.allreduce_async(mine, op=op)),
                *hvd.grouped_allreduce([mine], op=op),
                *hvd.synchronize(hvd.grouped_allreduce_async([mine, mine[:1]], op=op))[:1],
            ]
            assert torch.equal(mine, other), "the argument was changed"
            assert hvd.allreduce_(other, op=op) is other
            third = rows(me.rank, dtype)
            assert hvd.synchronize(hvd.allreduce_async_(third, op=op)) is third
            pair = [rows(me.rank, dtype), rows(me.rank, dtype)]
            hvd.grouped_allreduce_(pair, op=op)
            last = [rows(me.rank, dtype)]
            hvd.synchronize(hvd.grouped_allreduce_async_(last, op=op))
            for result in (*results, other, third, *pair, *last):
                assert result.dtype == dtype
                assert torch.equal(result, values.to(dtype)), (dtype, op)


@on_ranks(MANY)
def test_allgather_puts_rows_of_uneven_numbers_together(me: Rank) -> None:
    counts = [2 * rank % 3 for rank in range(me.size)]
    for dtype in (*EVERY, torch.bool):
        mine = rows(me.rank, dtype, counts[me.rank])
        every = torch.cat([rows(rank, dtype, counts[rank]) for rank in range(me.size)])
        assert torch.equal(hvd.allgather(mine), every)
        assert torch.equal(hvd.synchronize(hvd.allgather_async(mine)), every)
        first, second = hvd.grouped_allgather([mine, mine[:1]])
        assert torch.equal(first, every)
        assert len(second) == sum(min(n, 1) for n in counts)
        handle = hvd.grouped_allgather_async([mine])
        assert torch.equal(hvd.synchronize(handle)[0], every)


@on_ranks(MANY)
def test_alltoall_sends_rows_to_everyone(me: Rank) -> None:
    for dtype in EVERY:
        equal = torch.full((2 * me.size, 3), me.rank).to(dtype)
        expected = torch.arange(me.size).repeat_interleave(2).to(dtype)
        assert torch.equal(hvd.alltoall(equal)[:, 0], expected)
        splits = torch.tensor([(me.rank + rank) % 3 for rank in range(me.size)], dtype=torch.int32)
        uneven = torch.full((int(splits.sum()), 2), me.rank).to(dtype)
        got, received = hvd.alltoall(uneven, splits)
        assert received.tolist() == splits.tolist(), "the table is symmetric"
        assert torch.equal(got[:, 0], torch.arange(me.size).repeat_interleave(splits).to(dtype))
        got, received = hvd.synchronize(hvd.alltoall_async(uneven, splits.tolist()))
        assert len(got) == sum(splits.tolist())


@on_ranks(MANY)
def test_reducescatter_gives_everyone_its_rows(me: Rank) -> None:
    first = 2 * me.size + 1
    every = torch.stack([rows(rank, torch.float64, first) for rank in range(me.size)])
    start = sum(2 + (rank < 1) for rank in range(me.rank))
    mine = slice(start, start + 2 + (me.rank < 1))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int32):
        total = every.sum(0)[mine].to(dtype)
        tensor = rows(me.rank, dtype, first)
        assert torch.equal(hvd.reducescatter(tensor, op=hvd.Sum), total)
        assert torch.equal(hvd.synchronize(hvd.reducescatter_async(tensor, op=hvd.Sum)), total)
        group = hvd.grouped_reducescatter([tensor, tensor[: me.size]], op=hvd.Sum)
        assert torch.equal(group[0], total)
        assert group[1].shape == (1, 2)
        handle = hvd.grouped_reducescatter_async([tensor], op=hvd.Sum)
        assert torch.equal(hvd.synchronize(handle)[0], total)
    mean = hvd.reducescatter(rows(me.rank, torch.float64, first))
    torch.testing.assert_close(mean, every.mean(0)[mine])


@on_ranks(MANY)
def test_broadcast_in_all_its_forms(me: Rank) -> None:
    for root in {0, me.size - 1}:
        for dtype in (*EVERY, torch.bool):
            theirs, mine = rows(root, dtype), rows(me.rank, dtype)
            assert torch.equal(hvd.broadcast(mine, root), theirs)
            assert torch.equal(hvd.synchronize(hvd.broadcast_async(mine, root)), theirs)
            assert torch.equal(mine, rows(me.rank, dtype))
            assert torch.equal(hvd.synchronize(hvd.broadcast_async_(mine, root)), theirs)
            assert torch.equal(mine, theirs)
        large = torch.full((70_001,), float(me.rank))
        assert (hvd.broadcast(large, root) == root).all()
        large = hvd.allreduce(large, op=hvd.Sum)
        assert (large == sum(range(me.size))).all()


@on_ranks(MANY)
def test_sparse_tensors_are_added(me: Rank) -> None:
    where = torch.tensor([[0, me.rank + 1]])
    mine = torch.sparse_coo_tensor(where, torch.ones(2, 3), (8, 3))
    total = hvd.sparse_allreduce_async(mine, "sparse", hvd.Sum)().to_dense()
    assert total[0].tolist() == [me.size] * 3
    assert total[1 : me.size + 1].tolist() == [[1.0] * 3] * me.size
    mean = hvd.sparse_allreduce_async(mine, "sparse", hvd.Average)().to_dense()
    torch.testing.assert_close(mean, total / me.size)


@on_ranks(MANY)
def test_tensors_of_every_layout(me: Rank) -> None:
    slanted = torch.arange(6.0).view(2, 3).t() + me.rank
    middle = torch.arange(6.0).view(2, 3).t() + (me.size - 1) / 2
    assert torch.equal(hvd.allreduce(slanted), middle)
    assert torch.equal(hvd.allreduce_(slanted), middle)
    assert hvd.allreduce(torch.empty(0, 4)).shape == (0, 4)
    assert hvd.allgather(torch.empty(0, 4)).shape == (0, 4)
    assert hvd.allreduce(torch.tensor(2.0), op=hvd.Sum).item() == 2 * me.size
    wave = torch.full((3,), 1 + 2j)
    assert torch.equal(hvd.allreduce(wave, op=hvd.Sum), wave * me.size)
    half = hvd.allreduce(torch.ones(3), op=hvd.Sum, compression=hvd.Compression.fp16)
    assert (half.dtype, half[0].item()) == (torch.float32, me.size)
    with pytest.warns(DeprecationWarning, match="average"):
        assert hvd.allreduce(torch.ones(1), average=False).item() == me.size
    with pytest.raises(ValueError, match="supersedes average"):
        hvd.allreduce(torch.ones(1), average=True, op=hvd.Sum)
    with pytest.raises(ValueError, match="not supported"):
        hvd.allreduce(torch.ones(2).to(torch.float8_e5m2))


@on_ranks(MANY)
def test_gradients_flow(me: Rank) -> None:
    def gradient(shape: tuple[int, ...], operation: object) -> torch.Tensor:
        x = torch.ones(shape, requires_grad=True)
        y = operation(x)
        (y * torch.arange(1.0, y.numel() + 1).view_as(y)).sum().backward()
        return x.grad.flatten().tolist()

    n = me.size
    ramp = [1.0, 2.0]
    assert gradient((2,), lambda x: hvd.allreduce(x, op=hvd.Sum)) == [n * v for v in ramp]
    assert gradient((2,), hvd.allreduce) == ramp
    assert gradient((2,), lambda x: torch.cat(hvd.grouped_allreduce([x, x]))) == [4.0, 6.0]
    start = sum(rank + 1 for rank in range(me.rank))
    mine = [start + i + 1.0 for i in range(me.rank + 1)]
    assert gradient((me.rank + 1,), hvd.allgather) == mine
    assert gradient((me.rank + 1,), lambda x: hvd.grouped_allgather([x])[0]) == mine
    root = n - 1
    expected = ramp if me.rank == root else [0.0, 0.0]
    assert gradient((2,), lambda x: hvd.broadcast(x, root)) == expected
    back = gradient((n,), hvd.alltoall)
    assert back == [me.rank + 1.0] * n
    splits = [1] * n
    assert gradient((n,), lambda x: hvd.alltoall(x, splits)[0]) == back
    assert gradient((n,), hvd.reducescatter) == [1.0] * n
    assert gradient((n,), lambda x: hvd.reducescatter(x, op=hvd.Sum)) == [float(n)] * n
    assert gradient((n,), lambda x: hvd.grouped_reducescatter([x])[0]) == [1.0] * n


@on_ranks(MANY)
def test_names_match_whatever_the_order(me: Rank) -> None:
    order = list(range(30))
    np.random.default_rng(me.rank).shuffle(order)
    handles = {}
    for i in order:
        kind = i % 3
        tensor = torch.full((i + 1,), float(me.rank + i))
        if kind == 0:
            handles[i] = hvd.allreduce_async(tensor, name=f"x{i}", op=hvd.Sum)
        elif kind == 1:
            handles[i] = hvd.broadcast_async(tensor, 0, name=f"x{i}")
        else:
            handles[i] = hvd.allgather_async(tensor, name=f"x{i}")
    for i, handle in handles.items():
        total = hvd.synchronize(handle).sum().item()
        ranks = range(me.size)
        expected = {
            0: (i + 1) * sum(rank + i for rank in ranks),
            1: (i + 1) * i,
            2: (i + 1) * sum(rank + i for rank in ranks),
        }
        assert total == expected[i % 3]
        assert hvd.synchronize(handle) is None


@on_ranks([Job(2), Job(4, "node", 2), Job(4, "world", 2)])
def test_operations_are_asynchronous(me: Rank) -> None:
    me.settle()
    if me.rank == 0:
        time.sleep(0.5)
    started = time.monotonic()
    handle = hvd.allreduce_async(torch.ones(2), name="late", op=hvd.Sum)
    assert time.monotonic() - started < 0.3
    if me.rank:
        assert not hvd.poll(handle)
    assert hvd.synchronize(handle).tolist() == [me.size] * 2
    handle = hvd.allreduce_async(torch.ones(2), name="late", op=hvd.Sum)
    until = time.monotonic() + 20
    while not hvd.poll(handle):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert hvd.synchronize(handle).tolist() == [me.size] * 2


@on_ranks([Job(2), Job(4, "node", 2), Job(4, "world", 2)])
def test_a_mismatch_is_an_error_on_every_rank_and_nothing_hangs(me: Rank) -> None:
    odd = me.rank == me.size - 1
    wrongs = [
        lambda: hvd.allreduce(torch.ones(3 if odd else 2), name="shape"),
        lambda: hvd.allreduce(
            torch.ones(2, dtype=torch.int32 if odd else torch.float32), name="type"
        ),
        lambda: hvd.broadcast(torch.ones(2), me.size - 1 if odd else 0, name="root"),
        lambda: hvd.allgather(torch.ones(2, 3 if odd else 2), name="inner"),
        lambda: hvd.allreduce(torch.ones(2), name="factor", prescale_factor=2.0 if odd else 1.0),
        lambda: hvd.grouped_allreduce([torch.ones(2), torch.ones(3 if odd else 2)], name="group"),
        lambda: hvd.reducescatter(torch.ones(5 if odd else 4), name="rows"),
    ]
    if me.job.scope == "node":  # Horovod waits for ever here
        two = (hvd.allgather, hvd.allreduce)
        wrongs.append(lambda: two[odd](torch.ones(2), name="kind"))
    for wrong in wrongs:
        with pytest.raises(hvd.HorovodInternalError, match=r"(?i)mismatched"):
            wrong()
        assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == me.size
    if me.job.scope == "world":
        return  # Horovod finds the rest on one rank only
    splits = [2] * me.size if odd else [1] * me.size
    with pytest.raises(hvd.HorovodInternalError, match="Sum of splits"):
        hvd.alltoall(torch.ones(me.size), splits, name="splits")
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == me.size
    me.settle()
    if not odd:
        handle = hvd.allreduce_async(torch.ones(2), name="twice")
        with pytest.raises(
            hvd.HorovodInternalError, match=r"same name as another tensor.*'torch.twice'"
        ):
            hvd.allreduce_async(torch.ones(2), name="twice")
    else:
        time.sleep(0.2)
        handle = hvd.allreduce_async(torch.ones(2), name="twice")
    assert hvd.synchronize(handle).tolist() == [1.0, 1.0]
    with pytest.raises(NotImplementedError, match="Adasum"):
        hvd.allreduce(torch.ones(1), op=hvd.Adasum)


@on_ranks([Job(2), Job(4, "node", 2)])
def test_a_name_that_one_rank_never_gives_is_named(me: Rank) -> None:
    from gossip_hvd import session

    coordinator = session.current().operations._letters.coordinator
    if coordinator is not None:
        coordinator._limit = 0.5
    me.settle()
    if me.rank != 1:
        with pytest.raises(
            hvd.HorovodInternalError, match=r"'torch.lonely' has waited .* ranks \[1\]"
        ):
            hvd.allreduce(torch.ones(1), name="lonely")
    me.settle()
    if me.rank == 1:
        with pytest.raises(hvd.HorovodInternalError, match="lonely"):
            hvd.allreduce(torch.ones(1), name="lonely")


@on_ranks(MANY)
def test_means_of_whole_numbers_lose_their_fraction(me: Rank) -> None:
    for dtype in (torch.int32, torch.int64):
        mine = torch.tensor([-1, 1, -3, 3, 8], dtype=dtype) * (me.rank == 0)
        expected = torch.tensor([-1, 1, -3, 3, 8], dtype=dtype)
        expected = expected.div(me.size, rounding_mode="trunc")
        assert hvd.allreduce(mine, op=hvd.Average).tolist() == expected.tolist()


@on_ranks([Job(2), Job(4, "node", 2), Job(4, "world", 2)])
def test_what_horovod_refuses_with_a_value_error(me: Rank) -> None:
    if me.rank == 0:
        first = hvd.allreduce_async(torch.ones(1), name="twice")
        with pytest.raises(ValueError, match="same name"):
            hvd.allreduce_async(torch.ones(1), name="twice")
        me.settle()
    else:
        me.settle()
        first = hvd.allreduce_async(torch.ones(1), name="twice")
    assert hvd.synchronize(first).item() == 1.0
    ones = torch.ones(me.size, dtype=torch.int32)
    for tensor, splits in (
        (torch.ones(me.size + 1), None),
        (torch.ones(me.size - 1), ones),
        (torch.ones(me.size), ones.float()),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - the sentences differ by scope
            hvd.alltoall(tensor, splits)
