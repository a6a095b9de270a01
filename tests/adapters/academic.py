"""The academic version: a whole job in one process, each node one replica with all its data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rank import Rank

import gossip_hvd.torch as hvd

Made = tuple[torch.nn.Module, torch.optim.Optimizer]
Body = Callable[[torch.nn.Module, Any, torch.Tensor, torch.Tensor], object]
"""One training step on one batch; losses are means, so that a larger batch is several ranks."""

BATCH = 4


def batch(rank: int, step: int, dtype: torch.dtype, features: int, targets: int) -> Any:
    """What one rank sees in one step."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(BATCH, features, generator=random, dtype=torch.float64)
    y = torch.randn(BATCH, targets, generator=random, dtype=torch.float64)
    dtype = torch.float64 if dtype.is_complex else dtype
    return x.to(dtype), y.to(dtype)


def mlp(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A small model, the same on every rank."""
    torch.manual_seed(3)
    layers = torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    return torch.nn.Sequential(*layers).to(dtype)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The usual one: momentum, weight decay, several groups."""
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 0.05}, {"params": rest, "weight_decay": 0.1}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def plain(model: torch.nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """The usual step."""
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


def academic(
    nodes: Sequence[Sequence[int]],
    model: torch.nn.Module,
    make_optimizer: Callable[[torch.nn.Module], Any],
    body: Body,
    steps: int,
    *,
    mix: bool,
    features: int = 5,
    targets: int = 3,
) -> torch.nn.Module:
    """Train in one process; ``mix`` averages all nodes' weights after every step.

    Without ``mix`` there must be one node: all-reduce. With it, it is Crossover of two nodes.
    """
    models = [copy.deepcopy(model) for _ in nodes]
    optimizers = [make_optimizer(m) for m in models]
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        for ranks, replica, optimizer in zip(nodes, models, optimizers, strict=True):
            data = [batch(rank, step, dtype, features, targets) for rank in ranks]
            body(
                replica, optimizer, torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
            )
        if mix:
            with torch.no_grad():
                for every in zip(*(m.parameters() for m in models), strict=True):
                    if every[0].requires_grad:
                        mean = torch.stack(list(every)).mean(0)
                        for p in every:
                            p.copy_(mean)
    return models[0]


def distributed(
    me: Rank,
    model: torch.nn.Module,
    make_optimizer: Callable[[torch.nn.Module], Any],
    body: Body,
    steps: int,
    *,
    features: int = 5,
    targets: int = 3,
    **options: Any,
) -> torch.nn.Module:
    """Train a copy of the model for real."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    wrapped = hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)
    assert wrapped is optimizer
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        body(model, optimizer, *batch(me.rank, step, dtype, features, targets))
    return model


def assert_as_academic(
    me: Rank,
    make_model: Callable[[], torch.nn.Module] = mlp,
    make_optimizer: Callable[[torch.nn.Module], Any] = sgd,
    body: Body = plain,
    steps: int = 4,
    *,
    methods: Sequence[str] = ("allreduce", "crossover"),
    rtol: float = 1e-9,
    atol: float = 1e-11,
    features: int = 5,
    targets: int = 3,
    **options: Any,
) -> None:
    """Real training and the academic version end with the same weights.

    Crossover of two nodes is the exact mean; of one node, nothing.
    """
    shape = {"features": features, "targets": targets}
    for method in methods:
        whole = method == "allreduce"
        nodes = [list(range(me.size))] if whole else me.nodes
        assert whole or len(nodes) <= 2
        expected = academic(
            nodes, make_model(), make_optimizer, body, steps, mix=not whole, **shape
        )
        mine = distributed(
            me, make_model(), make_optimizer, body, steps, method=method, **shape, **options
        )
        for (name, a), (_, b) in zip(
            mine.named_parameters(), expected.named_parameters(), strict=True
        ):
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=atol, msg=lambda m, n=name, k=method: f"{k}, {n}: {m}"
            )
        assert_nodes_equal(me, mine)


def assert_nodes_equal(me: Rank, model: torch.nn.Module) -> None:
    """All ranks of a node hold the same bits."""
    everywhere = me.gather([p.detach().clone() for p in model.parameters()])
    for ranks in me.nodes:
        for rank in ranks[1:]:
            for a, b in zip(everywhere[ranks[0]], everywhere[rank], strict=True):
                same = torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
                assert same, f"ranks {ranks[0]} and {rank} of one node differ"


def vector(model: torch.nn.Module) -> torch.Tensor:
    """All weights end to end, in double precision."""
    real = [torch.view_as_real(p) if p.is_complex() else p for p in model.parameters()]
    return torch.cat([p.detach().double().reshape(-1) for p in real])
