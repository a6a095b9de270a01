"""World-wide operations on tensors and models, in both scopes."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from rank import Rank
from ranks import ALL, BOTH_SCOPES, ODD, UNEVEN, Job, on_ranks

import gossip_hvd.torch as hvd
from gossip_hvd import operations, session

MANY = [Job(1), Job(1, "world"), Job(2), *BOTH_SCOPES, *UNEVEN[:2]]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBERS = (*FLOATS, torch.int32, torch.int64)


def small(me: Rank, dtype: torch.dtype = torch.float32, rank: int | None = None) -> torch.Tensor:
    """Small integers, which every dtype and every order of summation keeps exactly."""
    draw = np.random.default_rng([7, me.rank if rank is None else rank])
    return torch.from_numpy(draw.integers(-5, 6, (3, 4))).to(dtype)


def every(me: Rank, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([small(me, torch.float64, rank) for rank in range(me.size)])


@on_ranks(MANY)
def test_allreduce_is_the_reduction_over_the_world(me: Rank) -> None:
    for dtype in NUMBERS:
        mine, all_ = small(me, dtype), every(me, dtype)
        expected = {hvd.Sum: all_.sum(0), hvd.Min: all_.min(0)[0], hvd.Max: all_.max(0)[0]}
        for op, values in expected.items():
            result = hvd.allreduce(mine, op=op)
            assert result.dtype == dtype
            assert torch.equal(result, values.to(dtype)), (dtype, op)
        assert torch.equal(mine, small(me, dtype)), "the argument was changed"


@on_ranks(MANY)
def test_allreduce_averages_by_default(me: Rank) -> None:
    for dtype in FLOATS:
        expected = every(me, dtype).mean(0)
        close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
        for result in (
            hvd.allreduce(small(me, dtype)),
            hvd.allreduce(small(me, dtype), op=hvd.Average),
            hvd.allreduce(small(me, dtype), average=True),
        ):
            torch.testing.assert_close(result, expected.to(dtype), **close)
    assert torch.equal(
        hvd.allreduce(small(me), average=False), every(me, torch.float32).sum(0).float()
    )


@on_ranks(MANY)
def test_allreduce_scales_before_and_after(me: Rank) -> None:
    result = hvd.allreduce(small(me), op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0)
    assert torch.equal(result, 2 * every(me, torch.float32).sum(0).float())


@on_ranks(BOTH_SCOPES)
def test_numpys_numbers_are_numbers(me: Rank) -> None:
    factors = {"prescale_factor": np.float32(0.5), "postscale_factor": np.float64(4)}
    result = hvd.allreduce(small(me), op=hvd.Sum, **factors)
    assert torch.equal(result, 2 * every(me, torch.float32).sum(0).float())
    root = np.int64(1)
    assert torch.equal(hvd.broadcast(small(me), root), small(me, rank=1))
    rows, _ = hvd.alltoall(torch.full((me.size,), me.rank), np.ones(me.size, np.int64))
    assert rows.tolist() == list(range(me.size))


@on_ranks(MANY)
def test_allreduce_takes_tensors_of_every_shape(me: Rank) -> None:
    scalar = torch.tensor(float(me.rank))
    total = hvd.allreduce(scalar, op=hvd.Sum)
    assert (total.shape, total.item()) == ((), sum(range(me.size)))
    slanted = small(me).t()
    assert not slanted.is_contiguous()
    assert torch.equal(
        hvd.allreduce(slanted, op=hvd.Sum), every(me, torch.float32).sum(0).float().t()
    )
    assert hvd.allreduce(torch.empty(0, 3)).shape == (0, 3)
    weight = torch.nn.Parameter(small(me))
    assert torch.equal(
        hvd.allreduce(weight, op=hvd.Sum).detach(), every(me, torch.float32).sum(0).float()
    )


@on_ranks(MANY)
def test_allreduce_in_place_changes_the_tensor(me: Rank) -> None:
    mine = small(me)
    result = hvd.allreduce_(mine, op=hvd.Sum)
    assert torch.equal(mine, every(me, torch.float32).sum(0).float())
    assert result.data_ptr() == mine.data_ptr()


@on_ranks(MANY)
def test_broadcast_gives_everyone_the_roots_tensor(me: Rank) -> None:
    for root in {0, me.size - 1}:
        more = (torch.bool, torch.complex64) if me.job.scope == "node" else ()  # Horovod has none
        for dtype in (*NUMBERS, torch.uint8, *more):
            mine = small(me, dtype)
            assert torch.equal(hvd.broadcast(mine, root), small(me, dtype, root))
            assert torch.equal(mine, small(me, dtype))
            hvd.broadcast_(mine, root)
            assert torch.equal(mine, small(me, dtype, root))
        slanted = small(me).t()
        hvd.broadcast_(slanted, root)
        assert torch.equal(slanted, small(me, rank=root).t())
        assert hvd.broadcast(torch.tensor(me.rank), root).item() == root


@on_ranks(MANY)
def test_objects_travel(me: Rank) -> None:
    root = me.size - 1
    sent = {
        "rank": me.rank,
        "list": [1, (2, "three")],
        "nothing": None,
        "long": "x" * (me.rank + 1),
    }
    got = hvd.broadcast_object(sent, root_rank=root)
    assert got == {**sent, "rank": root, "long": "x" * (root + 1)}
    assert hvd.broadcast_object("hello" if me.rank == 0 else None, 0, name="greeting") == "hello"
    assert hvd.allgather_object(["r"] * me.rank) == [["r"] * rank for rank in range(me.size)]


class Zoo(torch.nn.Module):
    """Parameters and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm2d(3)
        self.thin = torch.nn.Parameter(torch.randn(5).bfloat16())
        self.scale = torch.nn.Parameter(torch.randn(()))
        self.wave = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.wide = torch.nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
        self.frozen = torch.nn.Parameter(torch.randn(4), requires_grad=False)
        self.tied = self.frozen
        self.register_buffer("mask", torch.rand(3) < 0.5)


def zoo(seed: int) -> Zoo:
    torch.manual_seed(seed)
    model = Zoo()
    model.norm.running_mean.normal_()
    model.norm.num_batches_tracked.fill_(10 * seed + 3)
    return model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(t, theirs[name]) for name, t in a.state_dict().items())


@on_ranks(MANY)
def test_broadcast_parameters_makes_models_equal(me: Rank) -> None:
    for root in {0, me.size - 1}:
        model = zoo(me.rank)
        hvd.broadcast_parameters(model.state_dict(), root_rank=root)
        assert same(model, zoo(root))
        model = zoo(me.rank)
        hvd.broadcast_parameters(model.named_parameters(), root_rank=root)
        for (name, mine), (_, theirs) in zip(
            model.named_parameters(), zoo(root).named_parameters(), strict=True
        ):
            assert torch.equal(mine, theirs), name
        assert model.norm.num_batches_tracked.item() == 10 * me.rank + 3
    with pytest.raises(ValueError, match="invalid params of type"):
        hvd.broadcast_parameters(5, root_rank=0)


@on_ranks(MANY)
def test_broadcast_parameters_reaches_a_model_in_training(me: Rank) -> None:
    torch.manual_seed(me.rank)
    model = torch.nn.Linear(3, 2)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters()
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    start = hvd.broadcast(model.weight, 0)
    assert torch.equal(model.weight, start)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # All had the same gradient; uneven nodes weigh it, and the mean over them is the plain step.
    optimizer.gossip.average_parameters()
    torch.testing.assert_close(model.weight, start - 0.1)


def trained(kind: str, seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    makers = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        "adam": lambda: torch.optim.AdamW(
            [{"params": [model.weight], "lr": 0.1 + seed}, {"params": [model.bias]}],
            weight_decay=0.3,
        ),
        "rprop": lambda: torch.optim.Rprop(model.parameters(), lr=0.1),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2),
    }
    optimizer = makers[kind]()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.full((2, 3), 1.0 + seed)).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer


def flat(state: object) -> list[tuple[str, object]]:
    """State as a list that can be compared: paths, numbers, lists of numbers."""
    if isinstance(state, torch.Tensor):
        return [(str(state.dtype), state.tolist())]
    if isinstance(state, dict):
        return [(f"{k!r} {path}", v) for k, inner in state.items() for path, v in flat(inner)]
    if isinstance(state, list | tuple):
        return [(f"{i} {path}", v) for i, inner in enumerate(state) for path, v in flat(inner)]
    return [(type(state).__name__, state)]


@on_ranks([Job(1), *BOTH_SCOPES])
def test_broadcast_optimizer_state_without_a_step(me: Rank) -> None:
    root = me.size - 1
    for kind in ("sgd", "adam", "rprop", "lbfgs"):
        for steps in (0, 3):
            # Only the root has trained: everywhere else the state is missing.
            model, optimizer = trained(kind, me.rank, steps if me.rank == root else 0)
            weights = copy.deepcopy(model.state_dict())
            hvd.broadcast_optimizer_state(optimizer, root_rank=root)
            _, expected = trained(kind, root, steps)
            assert flat(optimizer.state_dict()) == flat(expected.state_dict()), (kind, steps)
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, weights[name]), "weights were changed"


@on_ranks(BOTH_SCOPES)
def test_broadcast_optimizer_state_of_a_distributed_one(me: Rank) -> None:
    model, optimizer = trained("sgd", me.rank, 2 if me.rank == 0 else 0)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), 0)
    hvd.broadcast_optimizer_state(optimizer, 0)
    assert optimizer.gossip.round == 0
    states = me.gather(flat(optimizer.state_dict()))
    assert all(state == states[0] for state in states)
    assert states[0] == flat(trained("sgd", 0, 2)[1].state_dict())


class Odd(torch.optim.SGD):
    """Keeps something in its state that is no number."""


@on_ranks([Job(2)])
def test_broadcast_optimizer_state_refuses_what_needs_pickle(me: Rank) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = Odd(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["odd"] = {1, 2}
    with pytest.raises(hvd.ConfigError, match=r"\['odd'\] is a set"):
        hvd.broadcast_optimizer_state(optimizer, 0)


@on_ranks(ALL)
def test_average_parameters_is_the_exact_mean(me: Rank) -> None:
    model = zoo(me.rank)
    hvd.average_parameters(model)
    others = [zoo(rank) for rank in range(me.size)]
    for name, mine in model.named_parameters():
        values = [dict(other.named_parameters())[name].detach() for other in others]
        wide = torch.complex128 if mine.is_complex() else torch.float64
        mean = torch.stack([v.to(wide) for v in values]).mean(0).to(mine.dtype)
        eps = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(
            mine.detach(), mean, rtol=eps, atol=eps, msg=lambda m, name=name: f"{name}: {m}"
        )
    for name, mine in model.named_buffers():
        assert torch.equal(mine, dict(others[me.rank].named_buffers())[name]), name


@on_ranks(ALL)
def test_average_parameters_takes_buffers_on_request(me: Rank) -> None:
    model = zoo(me.rank)
    hvd.average_parameters(model, buffers=True)
    others = [zoo(rank) for rank in range(me.size)]
    mean = torch.stack([o.norm.running_mean.double() for o in others]).mean(0).float()
    torch.testing.assert_close(model.norm.running_mean, mean)
    # A count and a mask have no mean.
    assert model.norm.num_batches_tracked.item() == 10 * me.rank + 3
    assert torch.equal(model.mask, others[me.rank].mask)
    bits = me.gather([t.detach().clone() for t in (*model.parameters(), model.norm.running_mean)])
    for theirs in bits:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], theirs, strict=True))


@on_ranks(ALL)
def test_average_parameters_and_consensus_distance_in_training(me: Rank) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.3), model.named_parameters()
    )
    random = torch.Generator().manual_seed(me.rank)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=random)).square().sum().backward()
        optimizer.step()
    mine = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
    rows = torch.stack(me.gather(mine))[[ranks[0] for ranks in me.nodes]]
    distance = math.sqrt(((rows - rows.mean(0)) ** 2).sum().item() / len(me.nodes))
    assert optimizer.gossip.consensus_distance() == pytest.approx(distance, rel=1e-5, abs=1e-9)
    assert (distance > 1e-4) == (len(me.nodes) > 2)
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
    assert torch.equal(mine, after), "measuring changed the weights"
    optimizer.gossip.average_parameters()
    mean = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(mean, rows.mean(0).float(), rtol=1e-7, atol=1e-8)
    assert all(torch.equal(mean, other) for other in me.gather(mean))
    assert optimizer.gossip.consensus_distance() == 0.0


@on_ranks([*ODD, *UNEVEN])
def test_average_parameters_of_a_model_trained_in_part(me: Rank) -> None:
    torch.manual_seed(me.node)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.fill_(me.node)
        model[1].weight.fill_(me.node)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model[1].parameters(), lr=0.1))
    assert optimizer.gossip.round == 0
    hvd.average_parameters(model)
    over_nodes = sum(range(len(me.nodes))) / len(me.nodes)
    assert model[1].weight.unique().tolist() == pytest.approx([over_nodes])
    assert model[0].weight.unique().tolist() == pytest.approx(model[1].weight.unique().tolist()), (
        "one call, two kinds of mean"
    )


@on_ranks([Job(3), Job(4, "node", 2)])
def test_who_waits_for_a_small_operation_does_the_work(me: Rank) -> None:
    """What calls MPI's collectives stays with the thread made for it."""
    executor = session.current().operations._executor
    run, seen = executor.run, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "HELP", 30.0)
        patch.setattr(executor, "run", lambda *a: (seen.append(threading.get_ident()), run(*a)))
        for size in (1, 5_000):
            seen.clear()
            me.settle()
            for _ in range(10):
                assert hvd.allreduce(torch.ones(size), op=hvd.Sum).sum() == size * me.size
            mine = seen.count(threading.get_ident())
            assert mine > 0 if size == 1 else mine == 0
        me.settle()


@on_ranks([Job(2), Job(4, "node", 2)])
def test_threads_that_wait_share_the_work_with_ours(me: Rank) -> None:
    def work(number: int) -> list[float]:
        draw = random.Random(f"{me.rank} {number}")
        found = []
        for i in range(30):
            size = (1, 200, 3_000)[(number + i) % 3]
            handles = [
                hvd.allreduce_async(torch.full((size,), 1.0 + j), name=f"{number}.{i}.{j}")
                for j in draw.sample(range(2), draw.choice([0, 2]))
            ]
            found.append(
                hvd.allreduce(torch.full((size,), float(i + me.rank)), name=f"{number}.{i}")
            )
            for j in range(2 if not handles else 0):
                handles.append(hvd.allreduce_async(torch.ones(size), name=f"{number}.{i}.{j}"))
            for handle in handles:
                hvd.synchronize(handle)
        return [float(tensor.mean()) for tensor in found]

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(work, range(3)))
    assert results == [[i + (me.size - 1) / 2 for i in range(30)]] * 3


@on_ranks([Job(2), Job(4, "node", 2)])
def test_an_interrupt_of_who_does_the_work_loses_nothing(me: Rank) -> None:
    caught = 0
    for i in range(40):
        if me.rank == 0:
            time.sleep(0.004)
        found = np.ones(1)
        handle = session.current().operations.submit(
            "allreduce", f"interrupted {i}", [found], [(1,)], [found], awaited=True, op="sum"
        )
        try:
            if me.rank == me.size - 1:
                timer = threading.Timer(1e-4 * i, os.kill, (os.getpid(), signal.SIGINT))
                timer.start()
                handle.wait()
                timer.join()
                time.sleep(1.0)
        except KeyboardInterrupt:
            caught += 1
        handle.wait()
        assert found.tolist() == [me.size]
    assert caught == (40 if me.rank == me.size - 1 else 0)
