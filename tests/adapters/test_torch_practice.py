"""What people do around an optimizer: compile, average, evaluate, add parameters, load, copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from academic import assert_as_academic, assert_nodes_equal, batch, mlp, plain, sgd, vector
from launch import launch
from rank import Rank
from ranks import BOTH_SCOPES, Job, on_ranks

import gossip_hvd.torch as hvd
from gossip_hvd.options import EngineOptions

TIMINGS: tuple[dict[str, Any], ...] = ({}, {"timing": "awc"})
TWO_NODES = [Job(2), *BOTH_SCOPES]


def wrapped(model: torch.nn.Module, **options: Any) -> Any:
    return hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **options)


def trained(
    me: Rank,
    model: torch.nn.Module,
    optimizer: Any,
    steps: int = 3,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
    step: Callable[[], object] | None = None,
) -> torch.Tensor:
    """Weights after some steps, with the exchange in flight merged."""
    for number in range(steps):
        x, y = batch(me.rank, number, torch.float64, 5, 3)
        optimizer.zero_grad()
        ((forward or model)(x) - y).square().mean().backward()
        (step or optimizer.step)()
    optimizer.gossip.drain()
    return vector(model)


@on_ranks([Job(2)])
def test_compiled_models_and_steps_train_as_plain_ones(me: Rank) -> None:
    for options in TIMINGS:
        model = mlp()
        expected = trained(me, model, wrapped(model, **options))
        for compiled in ("model", "step"):
            torch._dynamo.reset()
            model = mlp()
            optimizer = wrapped(model, **options)
            forward = torch.compile(model, backend="eager") if compiled == "model" else None
            step = torch.compile(optimizer.step, backend="eager") if compiled == "step" else None
            found = trained(me, model, optimizer, forward=forward, step=step)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert optimizer.gossip.round == 3


@on_ranks(TWO_NODES)
def test_a_moving_average_of_weights_follows_the_mixed_ones(me: Rank) -> None:
    model = mlp()
    optimizer = wrapped(model)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    expected = vector(model)
    for step in range(4):
        plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
        ema.update_parameters(model)
        expected = vector(model) if step == 0 else (expected + vector(model)) / 2
    torch.testing.assert_close(vector(ema.module), expected, rtol=1e-12, atol=1e-12)
    assert_nodes_equal(me, ema.module)
    optimizer.gossip.average_parameters()
    assert not torch.equal(vector(ema.module), vector(model))


@on_ranks(TWO_NODES)
def test_evaluation_in_the_middle_changes_nothing(me: Rank) -> None:
    for options in TIMINGS:
        ends = []
        for evaluates in (False, True):
            model = mlp()
            optimizer = wrapped(model, **options)
            for step in range(4):
                plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
                if evaluates and me.rank == step % me.size:  # no other rank need know
                    before = vector(model)
                    model.eval()
                    with torch.no_grad():
                        model(batch(me.rank, 99, torch.float64, 5, 3)[0])
                    copy.deepcopy(model).state_dict()
                    model.train()
                    assert torch.equal(vector(model), before)
            optimizer.gossip.drain()
            ends.append(vector(model))
        assert torch.equal(*ends)


@on_ranks(TWO_NODES)
def test_drained_replicas_of_two_nodes_are_equal_before_an_evaluation(me: Rank) -> None:
    model = mlp()
    optimizer = wrapped(model, timing="awc")
    trained(me, model, optimizer)
    start = vector(model)
    optimizer.gossip.drain()
    assert torch.equal(vector(model), start)
    optimizer.gossip.average_parameters()
    every = me.gather(vector(model))
    assert all(torch.equal(one, every[0]) for one in every)


class Growing(torch.nn.Module):
    """A model whose last layer is trained later."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        torch.manual_seed(4)
        self.head = torch.nn.Linear(3, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@on_ranks([Job(1), *TWO_NODES])
def test_parameters_added_later_are_trained_by_all(me: Rank) -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.body.parameters(), lr=0.1, momentum=0.9)

    def body(model: torch.nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        model.steps = getattr(model, "steps", 0) + 1
        if model.steps == 3:
            optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.05})
        plain(model, optimizer, x, y)

    def body_without_grads(
        model: torch.nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor
    ) -> None:
        if getattr(model, "steps", 0) < 3:
            model.head.zero_grad()
        body(model, optimizer, x, y)

    for make_body in (body, body_without_grads):
        assert_as_academic(me, Growing, make, make_body, steps=5, methods=("crossover",))
    model = Growing()
    optimizer = hvd.DistributedOptimizer(make(model), model.named_parameters())
    optimizer.add_param_group({"params": list(model.head.parameters())})
    plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
    assert {field.name for field in optimizer.gossip.layout.fields} == {
        name for name, _ in model.named_parameters()
    }


@on_ranks(TWO_NODES)
def test_a_loaded_state_is_taken_over_also_where_it_is_assigned(me: Rank) -> None:
    torch.manual_seed(8)
    start = {name: torch.randn_like(p) for name, p in mlp().state_dict().items()}
    for options in TIMINGS:
        model = mlp()
        model.load_state_dict({k: v.clone() for k, v in start.items()})
        expected = trained(me, model, wrapped(model, **options))
        model = mlp()
        model.load_state_dict({k: v.clone() for k, v in start.items()}, assign=True)
        assert torch.equal(trained(me, model, wrapped(model, **options)), expected)


@on_ranks([Job(2)])
def test_parameters_replaced_under_an_optimizer_train_no_more(me: Rank) -> None:
    # As in PyTorch: the optimizer keeps the parameters that it was given.
    model = mlp()
    optimizer = wrapped(model)
    state = {name: torch.zeros_like(p) for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
    assert not vector(model).any()


@on_ranks([Job(2)])
def test_a_copy_of_the_optimizer_is_a_plain_one(me: Rank) -> None:
    model = mlp()
    optimizer = wrapped(model)
    plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is type(optimizer)
        assert not hasattr(other, "gossip")
        before = vector(model)
        if me.rank == 0:  # nobody else need know
            other.step()
        assert torch.equal(vector(model), before)


@on_ranks([Job(2)])
def test_none_stands_for_an_options_default(me: Rank) -> None:
    optimizer = wrapped(mlp(), **dict.fromkeys(EngineOptions.names()))
    assert optimizer.gossip.options == wrapped(mlp()).gossip.options


def test_ranks_that_end_early_leave_horovod_to_the_others() -> None:
    program = """
import time, torch
import gossip_hvd.torch as hvd
hvd.init(node_size=2, horovod_scope="world")
if hvd.rank() > 1:
    time.sleep(1)
    node = hvd.node_process_set()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=node).item() == 2
"""
    outcome = launch(program, 4)
    assert (outcome.code, outcome.left) == (0, ()), outcome.text


def test_a_setting_that_all_refuse_is_shown_once() -> None:
    program = """
import torch
import gossip_hvd.torch as hvd
hvd.init(node_size=1)
model = torch.nn.Linear(2, 2)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
hvd.DistributedOptimizer(sgd, model.named_parameters(), seed=hvd.rank())
"""
    outcome = launch(program, 4)
    assert outcome.code != 0
    assert "seed=0" in outcome.err
    assert outcome.err.count("Traceback") == 1, outcome.err
