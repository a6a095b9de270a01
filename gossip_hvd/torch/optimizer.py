"""``DistributedOptimizer``: an ordinary optimizer that averages and gossips from now on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import horovod.torch as horovod
import torch

from gossip_hvd import session
from gossip_hvd.blocks import Segments
from gossip_hvd.methods import Method, method_of
from gossip_hvd.options import EngineOptions
from gossip_hvd.settings import setting
from gossip_hvd.torch.arguments import groups_of, named_of, refuse_searches, require_sense
from gossip_hvd.torch.gossip import TorchGossip
from gossip_hvd.torch.reduction import Named, ReductionOptions


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[Named] | None = None,
    compression: Any = horovod.Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = horovod.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    method: str | Method | None = None,
    segments: Segments = "blocks",
    **options: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer train together with all other ranks; returns the same optimizer.

    Another one that trained the same parameters until now trains them no more: with none left it
    is a plain optimizer again.

    Args:
        optimizer: any optimizer of PyTorch's; ``optimizer.gossip`` is added to it.
        named_parameters: usually ``model.named_parameters()``; names segments and errors.
        compression: of gradients inside the node, as Horovod's.
        backward_passes_per_step: backward passes that accumulate before a reduction.
        op: ``Average`` or ``Sum`` inside the node.
        gradient_predivide_factor: splits the averaging before and after the sum, as Horovod's.
        num_groups: reduce gradients in so many groups, as Horovod's.
        groups: or in these groups, a number or lists of parameters.
        sparse_as_dense: turn sparse gradients into dense ones.
        process_set: Horovod's argument; only the global set makes sense here.
        method: ``"crossover"`` (the default), ``"gossip"``, ``"allreduce"`` or a ``Method``;
            else ``GOSSIP_HVD_METHOD``.
        segments: ``"blocks"`` (the model's own), ``"one"``, a number of equally large ones, a
            function from a parameter's name to its segment's, or lists of names by segment.
        options: of the engine (``seed``, ``timing``, ``staleness``, ``wire_dtype``,
            ``chunk_bytes``) and of the method (``peers``, ``topology``, …).

    Raises:
        ConfigError: for unknown names and options, settings that differ between ranks.
        ValueError: for names that Horovod refuses too.
    """
    current = session.current()
    require_sense(
        optimizer, process_set, op, gradient_predivide_factor, num_groups, backward_passes_per_step
    )
    offered = None if named_parameters is None else list(named_parameters)
    named = named_of(optimizer, offered)
    reduction = ReductionOptions(
        compression,
        backward_passes_per_step,
        op,
        gradient_predivide_factor,
        sparse_as_dense,
        groups_of(named, num_groups, groups),
    )
    engine_options = EngineOptions.take(options)
    chosen = method_of(setting("METHOD", method), EngineOptions.names(), **options)
    refuse_searches(optimizer, chosen, current.scope, len(current.cluster.nodes))
    gossip = TorchGossip(current, optimizer, named, reduction, engine_options, chosen, segments)
    gossip.offered = offered or []
    return optimizer
