"""Horovod's arguments of ``DistributedOptimizer``, as this library understands them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods import Method
from gossip_hvd.rounds import MOMENTUM, VARIANCE
from gossip_hvd.variables import Framework, NodeAverage


def node_average(
    framework: Framework,
    *,
    compression: Any,
    op: Any,
    predivide: float,
    sparse_as_dense: bool,
    groups: Any,
    passes: int = 1,
    average_passes: bool = False,
    process_set: Any = None,
) -> NodeAverage:
    """How to average gradients over a node.

    Raises:
        ConfigError: for what has no meaning here.
        ValueError: for what Horovod refuses too.
    """
    hvd = framework.hvd
    op = hvd.Average if op is None else op
    if process_set is not None and process_set is not hvd.global_process_set:
        raise ConfigError(
            "process_set: gradients are averaged over this rank's node; choose nodes with "
            "init(node_size=…) instead."
        )
    if op not in (hvd.Average, hvd.Sum):
        raise ConfigError(f"op={op}: gradients of a node are combined by Average or Sum.")
    if predivide != 1.0 and op != hvd.Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if passes < 1:
        raise ValueError("backward_passes_per_step must be > 0")
    if not isinstance(groups, int):
        groups = tuple(tuple(framework.key(v) for v in group) for group in groups)
        flat = [key for group in groups for key in group]
        if len(flat) != len(set(flat)):
            raise ValueError("A variable can only appear once in groups.")
    elif groups < 0:
        raise ValueError("groups should be a non-negative integer or a list of lists.")
    return NodeAverage(
        compression=hvd.Compression.none if compression is None else compression,
        op=op,
        predivide=predivide,
        sparse_as_dense=sparse_as_dense,
        groups=groups,
        # Keras averages what it has accumulated; Horovod adds it, unless asked to average.
        factor=1.0 if average_passes else float(passes),
    )


def accumulate(optimizer: Any, passes: int) -> None:
    """Have Keras accumulate so many gradients before an update.

    Raises:
        ConfigError: where the optimizer says something else, or it is too late to say it.
    """
    if passes == 1:
        return
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ConfigError(
            f"backward_passes_per_step={passes}: a MultiOptimizer does not accumulate; give its "
            "optimizers gradient_accumulation_steps."
        )
    # A LossScaleOptimizer hands every gradient on.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    said = optimizer.gradient_accumulation_steps
    if said not in (None, passes):
        raise ConfigError(
            f"backward_passes_per_step={passes} beside gradient_accumulation_steps={said}: they "
            "mean the same; give one of them."
        )
    if said is None and optimizer.built:
        raise ConfigError(
            f"backward_passes_per_step={passes}: this optimizer has been built already. Wrap it "
            f"before its first use, or make it with gradient_accumulation_steps={passes}."
        )
    optimizer.gradient_accumulation_steps = passes


BUFFERS = {MOMENTUM: ("momentums", "_momentums"), VARIANCE: ("_velocities",)}
"""What Keras's optimizers call the buffers of a payload slot."""


def history_of(
    optimizer: Any, framework: Framework, variables: Sequence[Any]
) -> dict[str, dict[object, Any]]:
    """The optimizer's buffers for payload slots, by slot and variable's key."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    found: dict[str, dict[object, Any]] = {}
    for slot, names in BUFFERS.items():
        buffers: Sequence[Any] = next(
            (getattr(inner, n) for n in names if getattr(inner, n, None)), []
        )
        pairs = zip(variables, buffers, strict=False)
        found[slot] = {framework.key(v): held for v, held in pairs if held is not None}
    return found


def fitted(method: Method, optimizer: Any) -> Method:
    """The method as it works with this optimizer.

    Raises:
        ConfigError: where it needs a history that this optimizer does not keep, or keeps otherwise.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    made = method.fitted(type(inner).__name__)
    momentum = MOMENTUM in (*made.writes, *made.reads)
    if momentum and made.needs_rate and isinstance(inner, keras.optimizers.SGD):
        raise ConfigError(
            f"method {made.name!r} computes with SGD's momentum, and Keras's SGD keeps it "
            "multiplied by the learning rate. Use Adam or AdamW, or PyTorch's own SGD with "
            "gossip_hvd.torch."
        )
    if made.needs_rate and isinstance(inner, keras.optimizers.MultiOptimizer):
        raise ConfigError(
            f"method {made.name!r} needs the learning rate, and a MultiOptimizer has several."
        )
    return made
