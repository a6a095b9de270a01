"""Horovod's arguments of ``DistributedOptimizer``, as this library understands them."""

from __future__ import annotations

from typing import Any

from gossip_hvd.errors import ConfigError
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


def momentum_of(optimizer: Any, framework: Framework, variables: list[Any]) -> dict[object, Any]:
    """The momentum of every variable, by key; empty for optimizers that keep none."""
    for name in ("momentums", "_momentums"):
        history = getattr(optimizer, name, None)
        if history:
            pairs = zip(variables, history, strict=True)
            return {framework.key(v): m for v, m in pairs if m is not None}
    return {}
