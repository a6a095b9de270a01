"""Horovod's operations over the world in both scopes; Keras variables are accepted as tensors.

In scope ``world`` Horovod answers. In scope ``node`` it knows one node only, so these are ours.
Gradients are what Horovod's are, but for the names of their operations in a graph: Horovod takes
those from tensors, whose names differ between ranks that have built different things before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

from gossip_hvd import session
from gossip_hvd.tensorflow import functions
from gossip_hvd.tensorflow.memory import native
from gossip_hvd.tensorflow.operations import horovod_answers, named, traced_name, world_operation
from gossip_hvd.tensorflow.tensors import differentiable, dtypes, shaped, shaped_rows, tensor_of

_How = dict[str, Any]
"""Arguments of Horovod's, by name."""


def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = horovod.Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = False,
) -> Any:
    """The reduction of a tensor, sparse slices included, over all ranks; arguments as Horovod's."""
    return grouped_allreduce(
        [tensor],
        average,
        device_dense,
        device_sparse,
        compression,
        op,
        prescale_factor,
        postscale_factor,
        process_set,
        ignore_name_scope,
        name,
    )[0]


def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = horovod.Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list[Any]:
    """The reductions of several tensors, dense ones as one operation; arguments as Horovod's."""
    how = {
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "compression": compression,
        "op": _op(op, average),
        "prescale_factor": prescale_factor,
        "postscale_factor": postscale_factor,
    }
    whose = {"ignore_name_scope": ignore_name_scope, "process_set": process_set}
    tensors = [tensor_of(tensor) for tensor in tensors]
    sparse = [isinstance(tensor, tf.IndexedSlices) for tensor in tensors]
    dense = iter(
        _allreduce(
            [t for t, is_sparse in zip(tensors, sparse, strict=True) if not is_sparse],
            name,
            how,
            whose,
        )
    )
    names = [name] if len(tensors) == 1 else [name and f"{name}_{i}" for i in range(len(tensors))]
    return [
        _sparse_allreduce(tensor, called, how, whose) if is_sparse else next(dense)
        for tensor, is_sparse, called in zip(tensors, sparse, names, strict=True)
    ]


def _allreduce(tensors: list[Any], name: str | None, how: _How, whose: _How) -> list[Any]:
    """``grouped_allreduce`` of dense tensors."""
    if not tensors:
        return []
    if horovod_answers(whose["process_set"]):

        def horovods(name: str | None, inputs: Sequence[Any]) -> list[Any]:
            called = _called("allreduce", name, **whose)
            if len(inputs) == 1:
                return [horovod.allreduce(inputs[0], **how, **called)]
            return list(horovod.grouped_allreduce(list(inputs), **how, **called))

        return differentiable(
            lambda *inputs: horovods(name, inputs),
            lambda gradients, _: horovods(name and f"{name}.gradient", gradients),
        )(*tensors)
    compression = how["compression"]
    packed, contexts = zip(*(compression.compress(tensor) for tensor in tensors), strict=True)
    factors = {"prescale": how["prescale_factor"], "postscale": how["postscale_factor"]}

    def reduce(*inputs: Any) -> list[Any]:
        details = {"op": named(how["op"]), **factors}
        outputs = world_operation("allreduce", inputs, name, dtypes(inputs), **details)
        return shaped(outputs, inputs)

    reduced = differentiable(reduce, lambda gradients, _: reduce(*gradients))(*packed)
    return [compression.decompress(r, c) for r, c in zip(reduced, contexts, strict=True)]


def _sparse_allreduce(slices: Any, name: str | None, how: _How, whose: _How) -> Any:
    """Every rank's slices behind each other."""
    if horovod_answers(whose["process_set"]):
        return horovod.allreduce(slices, **how, **_called("allreduce", name, **whose))
    if how["op"] not in (horovod.Sum, horovod.Average):
        raise NotImplementedError("Only Sum and Average ops are supported with tf.IndexedSlices")
    if how["prescale_factor"] != 1.0 or how["postscale_factor"] != 1.0:
        raise NotImplementedError("Pre/postscale_factor are not supported with tf.IndexedSlices")
    values, indices = grouped_allgather([slices.values, slices.indices], name=name)
    if how["op"] == horovod.Average:
        values /= tf.cast(session.current().world.size, values.dtype)
    return tf.IndexedSlices(values, indices, slices.dense_shape)


def allgather(
    tensor: Any,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> Any:
    """The rows of all ranks, by rank; first dimensions may differ."""
    return grouped_allgather([tensor], name, ignore_name_scope, process_set)[0]


def grouped_allgather(
    tensors: Sequence[Any],
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> list[Any]:
    """The rows of all ranks of several tensors, as one operation."""
    tensors = [tensor_of(tensor) for tensor in tensors]

    def gather(*inputs: Any) -> list[Any]:
        if horovod_answers(process_set):
            names = [name and f"{name}_{i}" for i in range(len(inputs))]
            called = [_called("allgather", each, ignore_name_scope, process_set) for each in names]
            return [horovod.allgather(x, **how) for x, how in zip(inputs, called, strict=True)]
        outputs = world_operation("allgather", inputs, name, dtypes(inputs))
        return [shaped_rows(out, x) for out, x in zip(outputs, inputs, strict=True)]

    def backward(gradients: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        means = grouped_allreduce(gradients, op=horovod.Average, process_set=process_set)
        rows = tf.stack([tf.shape(tensor)[0] for tensor in tensors])
        before = allgather(rows[None], process_set=process_set)[: _place(process_set)]
        starts = tf.reduce_sum(before, axis=0)
        return [mean[starts[i] : starts[i] + rows[i]] for i, mean in enumerate(means)]

    return differentiable(gather, backward)(*tensors)


def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> Any:
    """The tensor of world rank ``root_rank``."""
    tensor = tensor_of(tensor)

    def send(*inputs: Any) -> list[Any]:
        if horovod_answers(process_set):
            called = _called("broadcast", name, ignore_name_scope, process_set)
            return [horovod.broadcast(inputs[0], root_rank, **called)]
        outputs = world_operation("broadcast", inputs, name, dtypes(inputs), root=root_rank)
        return shaped(outputs, inputs)

    def backward(gradients: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        mean = allreduce(gradients[0], op=horovod.Average, process_set=process_set)
        # Multiplied, or a graph would leave out what nobody needs: the root would wait for ever.
        return [mean * tf.cast(session.current().world.rank == root_rank, mean.dtype)]

    return differentiable(send, backward)(tensor)[0]


def broadcast_(
    variables: Sequence[Any], root_rank: int, name: str | None = None, process_set: Any = None
) -> list[Any]:
    """Overwrite variables with those of world rank ``root_rank``; returns their values."""
    for i, variable in enumerate(variables):
        value = broadcast(variable, root_rank, name and f"{name}.{i}", process_set=process_set)
        native(variable).assign(value)
    return [native(variable).read_value() for variable in variables]


def broadcast_variables(
    variables: Iterable[Any], root_rank: int, process_set: Any = None, inplace: bool = False
) -> None:
    """As ``functions.broadcast_variables``, which it calls, but also while a graph is traced.

    Args:
        variables: the same on all ranks.
        root_rank: world rank that has the values to keep.
        process_set: Horovod's argument; refused, since the whole world takes part.
        inplace: Horovod's argument; variables are always overwritten.
    """
    functions.require_everybody(process_set, "broadcast_variables")
    if tf.executing_eagerly():
        functions.broadcast_variables(variables, root_rank)
        return
    natives = [native(variable) for variable in variables]

    def finish(*_: Any) -> Any:
        functions.settle()
        return np.int32(0)

    # The values order it behind what the graph has done to the variables so far.
    held = [variable.read_value() for variable in natives]
    with tf.control_dependencies([tf.numpy_function(finish, held, tf.int32, stateful=True)]):
        values = [broadcast(variable.read_value(), root_rank) for variable in natives]
    for variable, value in zip(natives, values, strict=True):
        variable.assign(value)


def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> Any:
    """Send some rows to each rank, and get theirs; with ``splits`` also how many from each."""
    tensor = tensor_of(tensor)
    further = [] if splits is None else [tf.cast(splits, tf.int32)]

    def send(*inputs: Any) -> list[Any]:
        if horovod_answers(process_set):
            called = _called("alltoall", name, ignore_name_scope, process_set)
            none = tf.constant([], tf.int32)
            return list(horovod.alltoall(inputs[0], *(further or [none]), **called))
        both = [tensor.dtype, tf.int32]
        rows, received = world_operation("alltoall", [*inputs, *further], name, both)
        return [shaped_rows(rows, tensor), tf.ensure_shape(received, [None])]

    def backward(gradients: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        return [alltoall(gradients[0], outputs[1], process_set=process_set)[0]]

    rows, received = differentiable(send, backward)(tensor)
    return rows if splits is None else (rows, received)


def reducescatter(
    tensor: Any,
    device_dense: str = "",
    compression: Any = horovod.Compression.none,
    op: Any = horovod.Average,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """This rank's rows of the reduction over all ranks; arguments as Horovod's."""
    return grouped_reducescatter(
        [tensor],
        device_dense,
        compression,
        op,
        process_set,
        prescale_factor,
        postscale_factor,
        name,
        ignore_name_scope,
    )[0]


def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: str = "",
    compression: Any = horovod.Compression.none,
    op: Any = horovod.Average,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    ignore_name_scope: bool = False,
) -> list[Any]:
    """This rank's rows of the reductions of several tensors; arguments as Horovod's."""
    tensors = [tensor_of(tensor) for tensor in tensors]
    packed, contexts = zip(*(compression.compress(tensor) for tensor in tensors), strict=True)

    def horovods(inputs: Sequence[Any]) -> list[Any]:
        members = _set(process_set)
        arguments: dict[str, Any] = {
            "op": op,
            "prescale_factor": prescale_factor,
            "postscale_factor": postscale_factor,
        }
        if len(inputs) > 1:  # Horovod names groups itself
            every = list(inputs)
            return list(
                horovod.grouped_reducescatter(every, device_dense, process_set=members, **arguments)
            )
        called = _called("reducescatter", name, ignore_name_scope, process_set)
        return [horovod.reducescatter(inputs[0], device_dense, **arguments, **called)]

    def reduce(*inputs: Any) -> list[Any]:
        if horovod_answers(process_set):
            return horovods(inputs)
        details = {"op": named(op), "prescale": prescale_factor, "postscale": postscale_factor}
        outputs = world_operation("reducescatter", inputs, name, dtypes(inputs), **details)
        return [shaped_rows(out, x) for out, x in zip(outputs, inputs, strict=True)]

    def backward(gradients: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        everybody = _size(process_set) if op == horovod.Sum else 1
        factor = everybody * prescale_factor * postscale_factor
        scaled = [g * tf.cast(factor, g.dtype) for g in gradients]
        return [allgather(g, process_set=process_set) for g in scaled]

    rows = differentiable(reduce, backward)(*packed)
    return [compression.decompress(r, c) for r, c in zip(rows, contexts, strict=True)]


def _op(op: Any, average: bool | None) -> Any:
    """As Horovod reads its old argument ``average``."""
    if average is not None and op is not None:
        raise ValueError("The op parameter supersedes average. Please provide only one of them.")
    if op is not None:
        return op
    return horovod.Sum if average is False else horovod.Average


def _set(process_set: Any) -> Any:
    return horovod.global_process_set if process_set is None else process_set


def _place(process_set: Any) -> int:
    """This rank's position among those that take part."""
    given = horovod_answers(process_set)
    return int(_set(process_set).rank()) if given else session.current().world.rank


def _size(process_set: Any) -> int:
    """How many take part."""
    given = horovod_answers(process_set)
    return int(_set(process_set).size()) if given else session.current().world.size


def _called(
    kind: str, name: str | None, ignore_name_scope: bool, process_set: Any
) -> dict[str, Any]:
    """What tells Horovod which operation is meant, and whose."""
    members = _set(process_set)
    if name is None and not tf.executing_eagerly():
        name, ignore_name_scope = traced_name(kind, members.process_set_id), True
    return {"name": name, "ignore_name_scope": ignore_name_scope, "process_set": members}
