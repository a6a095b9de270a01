"""Horovod's arguments of ``DistributedOptimizer``, checked with Horovod's own sentences."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import horovod.torch as horovod
import torch

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods import Method
from gossip_hvd.torch.process_sets import is_world
from gossip_hvd.torch.reduction import Named


def require_sense(
    optimizer: torch.optim.Optimizer,
    process_set: Any,
    op: Any,
    predivide: float,
    num_groups: int,
    passes: int,
) -> None:
    """Refuse what Horovod refuses, in its order, and what has no meaning between nodes.

    Raises:
        ConfigError: for what is ours to refuse.
        ValueError: for what Horovod refuses too.
    """
    if not is_world(process_set):
        raise ConfigError(
            "process_set: gradients are averaged over this rank's node; choose nodes with "
            "init(node_size=…) instead."
        )
    if "gossip" in vars(optimizer):
        raise ConfigError("this optimizer is distributed already: wrap it once.")
    if op not in (horovod.Average, horovod.Sum):
        raise ConfigError(f"op={op}: gradients of a node are combined by Average or Sum.")
    if predivide != 1.0 and op != horovod.Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if num_groups != 0:
        warnings.warn(
            "Parameter `num_groups` has been replaced by `groups`.",
            DeprecationWarning,
            stacklevel=3,
        )
    if passes <= 0:
        raise ValueError("backward_passes_per_step must be > 0")


def named_of(
    optimizer: torch.optim.Optimizer, named_parameters: Sequence[Named] | None
) -> list[Named]:
    """A unique name for every parameter of the optimizer, in the model's order."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return _once(
            (f"allreduce.noname.{i}.{j}", p)
            for i, group in enumerate(optimizer.param_groups)
            for j, p in enumerate(group["params"])
        )
    named = list(named_parameters)
    if any(not isinstance(entry, tuple) for entry in named):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced "
            "by model.named_parameters()."
        )
    names = [name for name, _ in named]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(
            "Parameter names in named_parameters must be unique. Found duplicates: "
            f"{', '.join(duplicates)}"
        )
    ids = {id(p) for _, p in named}
    if any(id(p) not in ids for p in own):
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named."
        )
    mine = {id(p) for p in own}
    return _once((name, p) for name, p in named if id(p) in mine)


def refuse_searches(
    optimizer: torch.optim.Optimizer, method: Method, scope: str, nodes: int
) -> None:
    """Raise for an optimizer that evaluates its closure as often as it likes in one step.

    Each evaluation is a backward, so each owes a round, and nodes would not make equally many.
    """
    delegated = method.name == "allreduce" and scope == "world"
    if isinstance(optimizer, torch.optim.LBFGS) and nodes > 1:
        if delegated or method.name == "none":
            return
        raise ConfigError(
            f"method {method.name!r} with LBFGS, which evaluates its closure several times in one "
            "step: nodes would not make equally many evaluations, and their rounds would not "
            "meet. It works with one node, with method='none', and with method='allreduce' in "
            "init(horovod_scope='world'), which is Horovod's own."
        )


def _once(named: Iterable[Named]) -> list[Named]:
    """Every parameter under its first name: tied ones may have several."""
    first: dict[int, Named] = {}
    for name, p in named:
        first.setdefault(id(p), (name, p))
    return list(first.values())


def groups_of(named: Sequence[Named], num_groups: int, groups: Any) -> tuple[tuple[str, ...], ...]:
    """Horovod's groups as names."""
    if groups is None:
        groups = num_groups
    if isinstance(groups, int):
        if groups < 0:
            raise ValueError("groups should be a non-negative integer or a list of lists.")
        names = [name for name, p in named if p.requires_grad]
        cuts = [i * len(names) // groups for i in range(groups + 1)] if groups else []
        return tuple(tuple(names[a:b]) for a, b in itertools.pairwise(cuts) if b > a)
    if not all(isinstance(p, torch.Tensor) for group in groups for p in group):
        raise ValueError("groups must consist of torch.Tensor.")
    names_by_id = {id(p): name for name, p in named}
    if any(id(p) not in names_by_id for group in groups for p in group):
        raise ValueError("groups contain a parameter that this optimizer does not have.")
    named_groups = tuple(tuple(names_by_id[id(p)] for p in group) for group in groups)
    flat = [name for group in named_groups for name in group]
    if len(flat) != len(set(flat)):
        raise ValueError("A parameter can only appear once in groups.")
    return named_groups
