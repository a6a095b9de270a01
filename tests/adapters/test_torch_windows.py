"""Steps behind fewer backward passes than announced, as at the end of an epoch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from academic import assert_as_academic, assert_nodes_equal, batch, mlp, plain, sgd, vector
from rank import Rank
from ranks import BOTH_SCOPES, Job, on_ranks

import gossip_hvd.torch as hvd

PASSES = 4
WINDOWS = (4, 2, 4, 1, 3, 4)
"""Backward passes before each step."""


def wrapped(model: torch.nn.Module, passes: int = PASSES, **options: Any) -> Any:
    return hvd.DistributedOptimizer(
        sgd(model), model.named_parameters(), backward_passes_per_step=passes, **options
    )


def accumulate(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, passes: int) -> None:
    for i in range(passes):
        (model(x[i::PASSES]) - y[i::PASSES]).square().mean().backward()


@on_ranks([Job(1), Job(2), *BOTH_SCOPES, Job(2, "node", 2)])
def test_short_windows_are_reduced_too(me: Rank) -> None:
    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        model.steps = getattr(model, "steps", 0) + 1
        optimizer.zero_grad()
        accumulate(model, x, y, WINDOWS[model.steps - 1])
        optimizer.step()

    assert_as_academic(me, body=body, steps=len(WINDOWS), backward_passes_per_step=PASSES)
    model = mlp()
    optimizer = wrapped(model)
    for step in range(len(WINDOWS)):
        body(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
        assert_nodes_equal(me, model)
    assert optimizer.gossip.round == (len(WINDOWS) if len(me.nodes) > 1 else 0)


@on_ranks(BOTH_SCOPES)
def test_synchronize_reduces_a_short_window_for_clipping(me: Rank) -> None:
    model, replica = mlp(), mlp()
    optimizer = wrapped(model, method="allreduce")
    accumulate(model, *batch(me.rank, 0, torch.float64, 5, 3), 2)
    optimizer.synchronize()
    data = [batch(rank, 0, torch.float64, 5, 3) for rank in range(me.size)]
    accumulate(replica, *(torch.cat([pair[i] for pair in data]) for i in (0, 1)), 2)
    for mine, theirs in zip(model.parameters(), replica.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    with optimizer.skip_synchronize():
        optimizer.step()
    sgd(replica).step()
    torch.testing.assert_close(vector(model), vector(replica), rtol=1e-10, atol=1e-12)


@on_ranks(BOTH_SCOPES)
def test_steps_that_shall_not_synchronize_wait_for_nobody(me: Rank) -> None:
    for paused in (False, True):
        model = mlp()
        optimizer = wrapped(model, 2)
        x, y = batch(me.rank, 0, torch.float64, 5, 3)
        if me.rank == 0:  # nobody else reduces
            with optimizer.gossip.no_sync() if paused else optimizer.skip_synchronize():
                accumulate(model, x, y, 1)
                before = [p.grad.clone() for p in model.parameters()]
                optimizer.step()
            for gradient, p in zip(before, model.parameters(), strict=True):
                assert torch.equal(gradient, p.grad)


@on_ranks([Job(1), Job(2), *BOTH_SCOPES, Job(2, "node", 2)])
def test_a_closure_may_compute_a_window_a_part_or_its_end(me: Rank) -> None:
    def body(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        model.steps = getattr(model, "steps", 0) + 1
        passes = WINDOWS[model.steps - 1]
        optimizer.zero_grad()
        if model.steps % 3 == 0:  # begun before the step
            accumulate(model, x, y, 1)

        def closure() -> torch.Tensor:
            accumulate(model, x, y, passes)
            return torch.zeros(())

        optimizer.step(closure) if model.steps % 2 else optimizer.step(closure=closure)

    assert_as_academic(me, body=body, steps=len(WINDOWS), backward_passes_per_step=PASSES + 1)
    model = mlp()
    optimizer = wrapped(model)
    for step in range(len(WINDOWS)):
        body(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
        assert_nodes_equal(me, model)


@on_ranks(BOTH_SCOPES)
def test_a_window_begins_anew_with_another_length_or_a_loaded_state(me: Rank) -> None:
    for again in ("length", "state"):
        model = mlp()
        optimizer = wrapped(model, 2)
        x, y = batch(me.rank, 0, torch.float64, 5, 3)
        accumulate(model, x, y, 1)
        if again == "length":
            optimizer.set_backward_passes_per_step(3)
        else:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.zero_grad()
        accumulate(model, x, y, 2 if again == "length" else 1)
        optimizer.gossip.drain()
        assert optimizer.gossip.round == 0
        accumulate(model, x, y, 1)
        optimizer.step()
        assert optimizer.gossip.round == 1
        assert_nodes_equal(me, model)


@on_ranks([Job(2, "node", 2)])
def test_a_sum_that_has_grown_is_refused_and_training_goes_on(me: Rank) -> None:
    model = mlp()
    optimizer = wrapped(model, 2, op=hvd.Sum)
    x, y = batch(me.rank, 0, torch.float64, 5, 3)
    accumulate(model, x, y, 3)
    try:
        optimizer.step()
    except hvd.ConfigError as error:
        assert "summed already" in str(error)
    else:
        raise AssertionError("a second sum of the same gradient")
    optimizer.zero_grad()
    optimizer.set_backward_passes_per_step(1)
    plain(model, optimizer, x, y)
    assert_nodes_equal(me, model)
