"""Ordinary PyTorch training code, one line changed: what it does must stay what it did.

Most checks compare with ``academic``: the same code in one process, on all data, with plain
optimizers. All-reduce and Crossover of two nodes must both end where it ends.
"""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any
from unittest import mock

import horovod.torch as horovod
import pytest
import torch
from academic import (
    assert_as_academic,
    assert_nodes_equal,
    batch,
    distributed,
    mlp,
    plain,
    sgd,
    vector,
)
from horovod.common.exceptions import HorovodInternalError
from rank import Rank
from ranks import BOTH_SCOPES, ONE_NODE, Job, on_ranks

import gossip_hvd.torch as hvd
from gossip_hvd.torch import reduction

FEW = [Job(1), Job(2), *BOTH_SCOPES]
TWO_BY_TWO = BOTH_SCOPES
LOOSE = {"rtol": 1e-4, "atol": 1e-5}


def wrapped(model: torch.nn.Module, optimizer: Any = None, **options: Any) -> Any:
    return hvd.DistributedOptimizer(optimizer or sgd(model), model.named_parameters(), **options)


@on_ranks([*FEW, *ONE_NODE])
def test_optimizers_of_every_kind(me: Rank) -> None:
    kinds = {
        "sgd": sgd,
        "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
        "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
        "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
        "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01),
        "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
        "foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True),
    }
    for make in kinds.values():
        assert_as_academic(me, mlp, make, steps=3, rtol=1e-7, atol=1e-9)


@on_ranks(FEW)
def test_gradients_are_complete_when_backward_returns(me: Rank) -> None:
    model, replica = mlp(), mlp()
    optimizer = wrapped(model, method="allreduce")
    x, y = batch(me.rank, 0, torch.float64, 5, 3)
    (model(x) - y).square().mean().backward()
    data = [batch(rank, 0, torch.float64, 5, 3) for rank in range(me.size)]
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    (replica(x) - y).square().mean().backward()
    for mine, theirs in zip(model.parameters(), replica.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    del optimizer  # without it there are no hooks


@on_ranks(FEW)
def test_clipping_sees_the_averaged_gradient(me: Rank) -> None:
    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        optimizer.zero_grad()
        (10 * (model(x) - y)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5, "nothing to clip"
        optimizer.step()

    assert_as_academic(me, body=body)


@on_ranks(FEW)
def test_closures(me: Rank) -> None:
    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss.item() > 0

    assert_as_academic(me, body=body)


@on_ranks(FEW)
def test_schedulers_made_before_and_after(me: Rank) -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = sgd(model)
        optimizer.early = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return optimizer

    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        if not hasattr(optimizer, "late"):
            optimizer.late = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
            optimizer.steps = 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain(model, optimizer, x, y)
            optimizer.early.step()
            optimizer.late.step()
        optimizer.steps += 1
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.45**optimizer.steps)

    assert_as_academic(me, make_optimizer=make, body=body)


@on_ranks([Job(1), *TWO_BY_TWO])
def test_the_optimizer_stays_what_it_is(me: Rank) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    plain(model, optimizer, *batch(0, 0, torch.float64, 5, 3))
    optimizer.mine = "kept"
    before, kind = copy.deepcopy(optimizer.state_dict()), type(optimizer)
    fired: list[int] = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    result = wrapped(model, optimizer)
    assert result is optimizer
    assert type(result) is kind
    assert isinstance(result, torch.optim.AdamW)
    assert result.mine == "kept"
    assert result.defaults["weight_decay"] == 0.3
    assert str(before) == str(result.state_dict())
    plain(model, result, *batch(me.rank, 1, torch.float64, 5, 3))
    assert fired == [1]
    result.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    result.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())
    result.synchronize()
    with result.skip_synchronize():
        result.step()
    with pytest.raises(hvd.ConfigError, match="distributed already"):
        hvd.DistributedOptimizer(result, model.named_parameters())


@on_ranks(TWO_BY_TWO)
def test_training_goes_on_from_saved_states(me: Rank) -> None:
    for method in ("allreduce", "crossover"):
        model = mlp()
        optimizer = wrapped(model, method=method)
        for step in range(3):
            plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
        saved = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=True)
        other = mlp()
        with torch.no_grad():
            other[0].weight.zero_()
        resumed = wrapped(other, method=method)
        other.load_state_dict(loaded["model"])
        resumed.load_state_dict(loaded["optimizer"])
        simple = mlp()
        sgd(simple).load_state_dict(loaded["optimizer"])
        for step in range(3, 6):
            plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
            plain(other, resumed, *batch(me.rank, step, torch.float64, 5, 3))
        assert torch.equal(vector(model), vector(other))


@on_ranks(TWO_BY_TWO)
def test_loading_weights_in_training_counts(me: Rank) -> None:
    for timing in ("atc", "awc"):
        model = mlp()
        optimizer = wrapped(model, timing=timing)
        start = copy.deepcopy(model.state_dict())
        for step in range(3):
            plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
        optimizer.gossip.drain()
        model.load_state_dict(start)
        optimizer.load_state_dict(sgd(model).state_dict())
        again = mlp()
        fresh = wrapped(again, timing=timing)
        for step in range(3):
            plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
            plain(again, fresh, *batch(me.rank, step, torch.float64, 5, 3))
        optimizer.gossip.drain()
        fresh.gossip.drain()
        torch.testing.assert_close(vector(model), vector(again), rtol=1e-12, atol=1e-12)


@on_ranks(TWO_BY_TWO)
def test_saved_models_are_as_large_as_plain_ones(me: Rank) -> None:
    def saved(model: torch.nn.Module) -> bytes:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return file.getvalue()

    model = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(4)))
    before = len(saved(model))
    optimizer = wrapped(model)
    plain(model, optimizer, torch.randn(4, 40), torch.randn(4, 40))
    assert len(saved(model)) < 1.1 * before
    loaded = torch.load(io.BytesIO(saved(model)), weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


@on_ranks(TWO_BY_TWO)
def test_a_copy_of_the_model_is_separate(me: Rank) -> None:
    model = mlp()
    optimizer = wrapped(model)
    plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
    twin = copy.deepcopy(model)
    assert torch.equal(vector(model), vector(twin))
    kept = vector(twin).clone()
    plain(model, optimizer, *batch(me.rank, 1, torch.float64, 5, 3))
    assert torch.equal(kept, vector(twin))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert vector(model).abs().sum() > 0.1
    # The copy's own gradients are nobody's business.
    rounds = optimizer.gossip.round
    if me.rank == 0:
        twin(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    assert optimizer.gossip.round == rounds


@on_ranks(FEW)
def test_two_backward_passes_a_step(me: Rank) -> None:
    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        optimizer.zero_grad()
        for half in (slice(0, None, 2), slice(1, None, 2)):
            (model(x[half]) - y[half]).square().mean().backward()
        optimizer.step()

    assert_as_academic(me, body=body, backward_passes_per_step=2)
    model = mlp()
    optimizer = wrapped(model, backward_passes_per_step=2)
    for step in range(3):
        body(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
    assert optimizer.gossip.round == (3 if len(me.nodes) > 1 else 0)


@on_ranks(FEW)
def test_two_backward_calls_without_saying_so(me: Rank) -> None:
    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        optimizer.zero_grad()
        for half in (slice(0, None, 2), slice(1, None, 2)):
            (model(x[half]) - y[half]).square().mean().backward()
        optimizer.step()

    assert_as_academic(me, body=body)


@on_ranks([Job(5, "node", 3), Job(5, "world", 3)])
def test_two_backward_calls_on_uneven_nodes(me: Rank) -> None:
    """The factor for uneven nodes may be applied once only, to what is new."""

    def step(model: Any, optimizer: Any, data: list[Any]) -> None:
        optimizer.zero_grad()
        for half in (slice(0, None, 2), slice(1, None, 2)):
            x, y = (torch.cat([pair[i][half] for pair in data]) for i in (0, 1))
            (model(x) - y).square().mean().backward()
        optimizer.step()

    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    for method in ("crossover", "allreduce"):
        model, replica = mlp(), mlp()
        optimizer = wrapped(model, make(model), method=method)
        data = [batch(rank, 0, torch.float64, 5, 3) for rank in range(me.size)]
        step(replica, make(replica), data)
        step(model, optimizer, [data[me.rank]])
        torch.testing.assert_close(vector(model), vector(replica), rtol=1e-12, atol=1e-12)


@on_ranks(TWO_BY_TWO)
def test_gradients_that_are_summed_twice_are_refused(me: Rank) -> None:
    for zero in ("optimizer", "model", "nobody"):
        model = mlp()
        optimizer = wrapped(model, op=hvd.Sum)
        x, y = batch(me.rank, 0, torch.float64, 5, 3)
        (model(x) - y).square().mean().backward()
        {"optimizer": optimizer, "model": model}.get(zero, torch.nn.Identity()).zero_grad()
        if zero == "nobody":
            with pytest.raises(hvd.ConfigError, match=r"'0\.weight' was summed already"):
                (model(x) - y).square().mean().backward()
            optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        assert_nodes_equal(me, model)


@on_ranks(FEW)
def test_groups_of_gradients(me: Rank) -> None:
    assert_as_academic(me, num_groups=2)
    assert_as_academic(me, groups=3)
    for method in ("allreduce", "crossover"):
        model = mlp()
        first, second, *_ = model.parameters()
        optimizer = wrapped(model, groups=[[first, second]], method=method)
        for step in range(2):
            plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
        expected = distributed(me, mlp(), sgd, plain, 2, method=method)
        torch.testing.assert_close(vector(model), vector(expected), rtol=1e-12, atol=1e-12)
        assert_nodes_equal(me, model)
    model = mlp()
    with pytest.raises(ValueError, match="only appear once in groups"):
        wrapped(model, groups=[[model[0].weight], [model[0].weight]])
    with pytest.raises(ValueError, match="does not have"):
        wrapped(model, groups=[[first]])


@on_ranks([Job(2, "node", 2), *TWO_BY_TWO])
def test_gradients_of_neighbours_are_reduced_by_one_operation(me: Rank) -> None:
    """Those of one dtype, up to 1 MiB; one without a gradient on some rank waits for the end."""
    lengths = {torch.float64: (10, 10), torch.float32: (10, 300_000, 10, 10)}
    model = torch.nn.ParameterList(
        torch.nn.Parameter(torch.ones(n, dtype=dtype)) for dtype in lengths for n in lengths[dtype]
    )
    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=1.0), method="allreduce")
    with (
        mock.patch.object(reduction.hvd, "allreduce_async_", wraps=horovod.allreduce_async_) as one,
        mock.patch.object(
            reduction.hvd, "grouped_allreduce_async_", wraps=horovod.grouped_allreduce_async_
        ) as many,
    ):
        used = [p for i, p in enumerate(model) if (i, me.rank) != (1, 1)]
        sum((me.rank + 1) * p.sum().double() for p in used).backward()
    assert [call.args[0].numel() for call in one.call_args_list] == [300_000, 10]
    assert [len(call.args[0]) for call in many.call_args_list] == [2, 2]
    for i, parameter in enumerate(model):
        mean = sum(r + 1 for r in range(me.size) if (i, r) != (1, 1)) / me.size
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, mean))
    optimizer.step()
    assert_nodes_equal(me, model)


@on_ranks([Job(2, "node", 2), *TWO_BY_TWO])
def test_a_reduction_that_fails_is_tried_again_by_the_next_backward(me: Rank) -> None:
    def failing(handle: int, facts: Any) -> None:
        watched(handle, facts)
        raise HorovodInternalError("once")

    model = torch.nn.Sequential(mlp(torch.float64), mlp(torch.float32))
    optimizer = wrapped(model, method="allreduce")

    def loss() -> torch.Tensor:
        x = torch.full((2, 5), me.rank + 1.0)
        return model[0](x.double()).sum() + model[1](x).sum()

    loss().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        watched = reduction.watched
        with (
            mock.patch.object(reduction, "watched", failing),
            pytest.raises(HorovodInternalError, match="once"),
        ):
            loss().backward()
        optimizer.zero_grad()
        loss().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)


@on_ranks([*FEW, *ONE_NODE])
def test_frozen_parameters_hold_nobody_back(me: Rank) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    for layer in model:
        layer.bias.requires_grad_(False)
    optimizer = wrapped(model, method="allreduce")
    bundles = optimizer.gossip._reduction._bundles
    assert [[name for name, _ in bundle.members] for bundle in bundles] == [
        ["0.weight", "1.weight", "2.weight"],
        ["0.bias", "1.bias", "2.bias"],
    ]


@on_ranks(FEW)
def test_predivided_gradients(me: Rank) -> None:
    assert_as_academic(me, gradient_predivide_factor=2.0)


@on_ranks(TWO_BY_TWO)
def test_sums_of_gradients(me: Rank) -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    # All-reduce sums over the world, as Horovod does; gossip over the node.
    for method, ranks in (("crossover", 2), ("allreduce", 4)):
        model, expected = mlp(), mlp()
        optimizer = wrapped(model, make(model), op=hvd.Sum, method=method)
        plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
        data = [batch(rank, 0, torch.float64, 5, 3) for rank in range(me.size)]
        reference = make(expected)
        reference.param_groups[0]["lr"] *= ranks
        plain(expected, reference, *(torch.cat([pair[i] for pair in data]) for i in (0, 1)))
        torch.testing.assert_close(vector(model), vector(expected), rtol=1e-10, atol=1e-12)


@on_ranks(FEW)
def test_compressed_gradients(me: Rank) -> None:
    assert_as_academic(
        me,
        lambda: mlp(torch.float32),
        steps=2,
        rtol=1e-2,
        atol=1e-3,
        compression=hvd.Compression.fp16,
    )


@on_ranks(FEW)
def test_dtypes_of_every_kind(me: Rank) -> None:
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 5e-3}
    for dtype, atol in close.items():
        assert_as_academic(
            me,
            lambda dtype=dtype: mlp(dtype),
            lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
            steps=2,
            rtol=0.0,
            atol=atol,
        )


class Medley(torch.nn.Module):
    """Several dtypes, a complex and a 0-d parameter, a frozen one, two that are one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = torch.nn.Linear(5, 5)
        self.outer = torch.nn.Linear(5, 3).double()
        self.wave = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.wide = torch.nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.thin = torch.nn.Parameter(torch.randn(5).bfloat16())
        self.frozen = torch.nn.Parameter(torch.randn(5), requires_grad=False)
        self.tied = torch.nn.Linear(5, 5)
        self.tied.weight = self.inner.weight
        self.empty = torch.nn.Parameter(torch.empty(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(torch.tanh(self.inner(x.float()))) * self.scale + self.frozen
        x = x * (self.wave.abs() + self.thin.float())
        return self.outer(x.double()) * self.wide.abs() + self.empty.sum()


@on_ranks([*FEW, Job(4), Job(5, "node", 2)])
def test_parameters_of_every_kind_in_one_model(me: Rank) -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    if len(me.nodes) <= 2:
        assert_as_academic(me, Medley, make, steps=3, rtol=0.02, atol=0.02)
    for options in ({}, {"segments": 4}, {"timing": "awc"}, {"wire_dtype": "bfloat16"}):
        model = Medley()
        frozen, start = model.frozen.clone(), vector(model)
        optimizer = wrapped(model, make(model), **options)
        for step in range(3):
            plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
        optimizer.gossip.drain()
        assert_nodes_equal(me, model)
        assert torch.equal(model.frozen, frozen)
        assert model.tied.weight is model.inner.weight
        assert not torch.equal(start, vector(model))
        assert torch.isfinite(vector(model)).all()
        optimizer.gossip.average_parameters()
        bits = me.gather([p.detach().clone() for p in model.parameters()])
        for theirs in bits:
            assert all(torch.equal(a, b) for a, b in zip(bits[0], theirs, strict=True))


class Scalar(torch.nn.Module):
    """A model of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slope * x


@on_ranks([*FEW, *ONE_NODE])
def test_a_model_of_one_number(me: Rank) -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    assert_as_academic(me, Scalar, make, features=1, targets=1)
    model = Scalar()
    optimizer = hvd.DistributedOptimizer(make(model))
    plain(model, optimizer, *batch(me.rank, 0, torch.float64, 1, 1))
    assert_nodes_equal(me, model)


@on_ranks(FEW)
def test_channels_last_convolutions_stay_so(me: Rank) -> None:
    def conv() -> torch.nn.Module:
        torch.manual_seed(3)
        layers = (
            torch.nn.Unflatten(1, (2, 4, 4)),
            torch.nn.Conv2d(2, 4, 3),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, 3, 2),
            torch.nn.Flatten(),
        )
        return torch.nn.Sequential(*layers).to(torch.float64, memory_format=torch.channels_last)

    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        plain(model, optimizer, x, y)
        assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
        assert not model[1].weight.is_contiguous()

    assert_as_academic(me, conv, body=body, features=32, targets=3)


@on_ranks(FEW)
def test_parameters_that_one_rank_does_not_use(me: Rank) -> None:
    model, expected = mlp(), mlp()

    def loss_of(model: torch.nn.Module, rank: int) -> torch.Tensor:
        x, y = batch(rank, 0, torch.float64, 5, 3)
        if rank == me.size - 1:
            return (model[0](x)).square().mean()
        return (model(x) - y).square().mean()

    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=0.1), method="allreduce")
    loss_of(model, me.rank).backward()
    optimizer.step()
    sum(loss_of(expected, rank) for rank in range(me.size)).div(me.size).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    if me.size > 1:
        torch.testing.assert_close(vector(model), vector(expected), rtol=1e-10, atol=1e-12)
    assert_nodes_equal(me, model)


@on_ranks([*FEW, Job(5, "node", 2)])
def test_parameters_unfrozen_and_frozen_later(me: Rank) -> None:
    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        optimizer.count = getattr(optimizer, "count", 0) + 1
        if optimizer.count == 3:
            model[0].weight.requires_grad_(True)
        if optimizer.count == 5:
            model[2].weight.requires_grad_(False)
            model[2].weight.grad = None
        plain(model, optimizer, x, y)

    def make_model() -> torch.nn.Module:
        model = mlp()
        model[0].weight.requires_grad_(False)
        return model

    if len(me.nodes) <= 2:
        assert_as_academic(me, make_model, body=body, steps=7, methods=["allreduce"])
    for options in ({}, {"timing": "awc"}):
        model = make_model()
        start = model[0].weight.clone()
        optimizer = wrapped(model, **options)
        for step in range(7):
            body(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
            assert torch.equal(start, model[0].weight) == (step < 2)
            assert_nodes_equal(me, model)
        optimizer.gossip.drain()
        assert len(set(me.gather(optimizer.gossip.round))) == 1
        assert optimizer.gossip.round == (7 if len(me.nodes) > 1 else 0)


@on_ranks(FEW)
def test_several_optimizers(me: Rank) -> None:
    """As a GAN: one's backward runs through the other's parameters."""

    def step(generator: Any, critic: Any, g: Any, c: Any, x: Any, y: Any) -> None:
        c.zero_grad()
        (critic(generator(x).detach()) - critic(y)).square().mean().backward()
        c.step()
        g.zero_grad()
        critic.requires_grad_(False)
        (critic(generator(x)) - y[:, :1]).square().mean().backward()
        critic.requires_grad_(True)
        g.step()

    def made() -> Any:
        generator = mlp()
        torch.manual_seed(8)
        critic = torch.nn.Linear(3, 1).double()
        return generator, critic, sgd(generator), torch.optim.SGD(critic.parameters(), lr=0.1)

    generator, critic, g, c = made()
    wrapped(generator, g, method="allreduce")
    wrapped(critic, c, method="allreduce")
    replicas = made()
    for number in range(3):
        step(generator, critic, g, c, *batch(me.rank, number, torch.float64, 5, 3))
        data = [batch(rank, number, torch.float64, 5, 3) for rank in range(me.size)]
        step(*replicas, *(torch.cat([pair[i] for pair in data]) for i in (0, 1)))
    torch.testing.assert_close(vector(generator), vector(replicas[0]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(vector(critic), vector(replicas[1]), rtol=1e-9, atol=1e-10)


@on_ranks([Job(1), *TWO_BY_TWO, Job(5, "node", 2)])
def test_one_backward_for_two_gossiping_optimizers(me: Rank) -> None:
    for options in ({}, {"timing": "awc"}):
        one, two = mlp(), torch.nn.Linear(3, 2).double()
        a, b = wrapped(one, **options), wrapped(two, torch.optim.Adam(two.parameters()), **options)
        for step in range(4):
            a.zero_grad()
            b.zero_grad()
            two(one(batch(me.rank, step, torch.float64, 5, 3)[0])).square().mean().backward()
            a.step()
            b.step()
        hvd.average_parameters(one)
        hvd.average_parameters(two)
        for model in (one, two):
            bits = me.gather(vector(model))
            assert all(torch.equal(bits[0], other) for other in bits)
        assert a.gossip.round == b.gossip.round == (4 if len(me.nodes) > 1 else 0)


class Words(torch.nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = torch.nn.Embedding(10, 3, sparse=sparse, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.words((x[:, 0].abs() * 3).long().clamp(max=9))


@on_ranks([*FEW, *ONE_NODE])
def test_sparse_gradients_stay_so_or_are_made_dense(me: Rank) -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    methods = ("allreduce", "crossover")
    for options in ({}, {"sparse_as_dense": True}):
        assert_as_academic(me, Words, make, methods=methods, **options)
    model = Words()
    optimizer = wrapped(model, torch.optim.SparseAdam(list(model.parameters()), lr=0.1))
    plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
    assert model.words.weight.grad.is_sparse
    assert_nodes_equal(me, model)


class Scaled(torch.nn.Module):
    """Words that a batch may do without, and a parameter that it may not."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.words = Words(sparse)
        self.scale = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor, words: bool) -> torch.Tensor:
        return self.scale * (self.words(x) if words else torch.ones_like(self.words(x)).detach())


@on_ranks(TWO_BY_TWO)
def test_a_rank_without_a_sparse_gradient(me: Rank) -> None:
    models = [Scaled(True), Scaled(False)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer = wrapped(model, optimizer, method="allreduce")
        for step in range(3):
            x, y = batch(me.rank, step, torch.float64, 5, 3)
            optimizer.zero_grad()
            (model(x, step == 0 or me.rank > 0) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(vector(models[0]), vector(models[1]), rtol=1e-12, atol=1e-12)


@on_ranks([Job(2, "node", 2)])
def test_a_sparse_gradient_in_a_group_is_refused(me: Rank) -> None:
    model = torch.nn.ModuleList([Words(), Words()])
    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=0.5), groups=1)
    x = batch(me.rank, 0, torch.float64, 5, 3)[0]
    with pytest.raises(ValueError, match="which a group cannot hold"):
        (model[0](x) + model[1](x)).sum().backward()
    del optimizer


@on_ranks([Job(2), *TWO_BY_TWO])
def test_a_model_converted_after_wrapping_is_refused(me: Rank) -> None:
    for convert in (lambda m: m.to(torch.float32), lambda m: m.half()):
        model = mlp(torch.float64)
        optimizer = wrapped(model)
        plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
        convert(model)
        dtype = next(model.parameters()).dtype
        with pytest.raises(hvd.ConfigError, match=r"Convert the model first"):
            plain(model, optimizer, *batch(me.rank, 1, dtype, 5, 3))


@on_ranks([*FEW, Job(4)])
def test_a_backward_that_raises_is_forgotten(me: Rank) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory, say")

    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        optimizer.zero_grad()
        # The second layer has its gradients by then; the first never gets any.
        hidden = Fails.apply(torch.tanh(model[0](x)))
        with pytest.raises(RuntimeError, match="out of memory"):
            (100 * model[2](hidden)).sum().backward()
        plain(model, optimizer, x, y)

    if len(me.nodes) <= 2:
        assert_as_academic(me, body=body, steps=3)
        assert_as_academic(me, body=body, steps=3, num_groups=2)
    model = mlp()
    optimizer = wrapped(model)
    for step in range(3):
        body(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
    assert_nodes_equal(me, model)
    assert optimizer.gossip.round == (3 if len(me.nodes) > 1 else 0)


@on_ranks([*FEW, Job(4)])
def test_a_closure_that_raises_is_forgotten(me: Rank) -> None:
    model = mlp()
    optimizer = wrapped(model)

    def closure() -> torch.Tensor:
        raise RuntimeError("out of memory, say")

    for step in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(closure)
        plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
    assert_nodes_equal(me, model)
    assert optimizer.gossip.round == (3 if len(me.nodes) > 1 else 0)


class Sharp(torch.optim.SGD):
    """As SAM: its step computes gradients at weights that it takes back."""

    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        kept = [p.detach().clone() for p in group["params"]]
        with torch.no_grad():
            for p in group["params"]:
                p.add_(p.grad, alpha=0.1)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for p, before in zip(group["params"], kept, strict=True):
                p.copy_(before)
        super().step()
        return loss


@on_ranks(FEW)
def test_nothing_is_mixed_inside_a_step(me: Rank) -> None:
    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)

    assert_as_academic(me, mlp, lambda m: Sharp(m.parameters(), lr=0.1), body)


@on_ranks(TWO_BY_TWO)
def test_checkpointed_activations(me: Rank) -> None:
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):

        def body(model: Any, optimizer: Any, x: Any, y: Any, reentrant: bool = reentrant) -> None:
            optimizer.zero_grad()
            x = x.requires_grad_(True)
            hidden = checkpoint(model[0], x, use_reentrant=reentrant)
            (model[2](torch.tanh(hidden)) - y).square().mean().backward()
            optimizer.step()

        assert_as_academic(me, body=body)
        model = mlp()
        optimizer = wrapped(model)
        for step in range(3):
            body(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
        assert optimizer.gossip.round == 3, f"use_reentrant={reentrant}"


@on_ranks(TWO_BY_TWO)
def test_autograd_grad_is_left_alone(me: Rank) -> None:
    model = mlp()
    optimizer = wrapped(model)
    x, y = batch(me.rank, 0, torch.float64, 5, 3)
    if me.rank == 0:  # a gradient that nobody else computes, and that no step follows
        torch.autograd.grad((model(x) - y).square().mean(), list(model.parameters()))
    plain(model, optimizer, x, y)
    assert optimizer.gossip.round == 1


@on_ranks(TWO_BY_TWO)
def test_steps_without_a_gradient_do_nothing(me: Rank) -> None:
    model = mlp()
    start = vector(model)
    optimizer = wrapped(model)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(start, vector(model))
    assert optimizer.gossip.round == 0


@on_ranks(TWO_BY_TWO)
def test_parameters_of_part_of_a_model(me: Rank) -> None:
    model = mlp()
    start = model[0].weight.clone()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model[2].parameters(), lr=0.1), model.named_parameters()
    )
    for step in range(3):
        plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
    assert torch.equal(start, model[0].weight)
    assert not torch.equal(mlp()[2].weight, model[2].weight)
    bits = me.gather(model[2].weight.detach().clone())
    assert all(torch.equal(bits[0], other) for other in bits)


@on_ranks(TWO_BY_TWO)
def test_weights_replaced_by_their_data_are_adopted(me: Rank) -> None:
    model = mlp()
    optimizer = wrapped(model)
    plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
    for p in model.parameters():
        p.data = p.data.clone()
    for step in range(1, 3):
        plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
    expected = distributed(me, mlp(), sgd, plain, 3)
    assert torch.equal(vector(model), vector(expected))


@on_ranks([Job(1), *TWO_BY_TWO])
def test_segments_may_be_chosen(me: Rank) -> None:
    lists = {"a": ["0.weight", "2.bias"], "b": ["0.bias", "2.weight"]}
    for segments, names in (
        ("blocks", ["0", "2"]),
        ("one", ["bytes0"]),
        (2, ["bytes0", "bytes1"]),
        (lambda name: name[-4:], ["ight", "bias"]),
        (lists, ["a", "b"]),
    ):
        model = mlp()
        optimizer = wrapped(model, segments=segments)
        assert [segment.name for segment in optimizer.gossip.layout.segments] == names
        plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
        bits = me.gather(vector(model))
        assert all(torch.equal(bits[0], other) for other in bits)
    for segments, said in (
        ({"a": ["0.weight"]}, "'0.bias' is in no segment"),
        ({"a": ["0.weight", "0.weight"]}, "in two segments"),
        ({"a": ["nowhere"]}, "no parameter of this model"),
        ("block", "expected 'blocks'"),
        (0, "1 segment or more"),
    ):
        with pytest.raises(hvd.ConfigError, match=said):
            wrapped(mlp(), segments=segments)
