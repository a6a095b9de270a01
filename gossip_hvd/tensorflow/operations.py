"""World-wide operations on TensorFlow tensors that Horovod cannot do in scope ``node``.

Outside a graph an operation is done at once. In a graph it is one ``numpy_function``, and its name
is found while the graph is traced, because several may run at once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from gossip_hvd import session
from gossip_hvd.errors import ConfigError, failing_as
from gossip_hvd.mixing import Array

OPS = {
    horovod.Average: "average",
    horovod.Sum: "sum",
    horovod.Min: "min",
    horovod.Max: "max",
    horovod.Product: "product",
}

_traced: WeakKeyDictionary[Any, Counter[tuple[str, int]]] = WeakKeyDictionary()


def traced_name(kind: str, members: int = 0) -> str:
    """A name for an operation in a graph: that of the ``tf.function``, and a number in it.

    So it does not matter what else a rank has traced, or how often, for a batch of another shape
    say. Tensors have names too, but ranks that have built different things before give them others.

    Args:
        kind: of the operation.
        members: the number of its process set, since others do not trace it.
    """
    graph = tf.compat.v1.get_default_graph()
    while (outer := getattr(graph, "outer_graph", None)) is not None and outer.building_function:
        graph = outer
    numbers = _traced.setdefault(graph, Counter())
    numbers[kind, members] += 1
    # TensorFlow ends the names of some functions with a number of its own, and refuses some signs.
    function = re.sub(r"\W", "_", re.sub(r"_\d+$", "", getattr(graph, "name", "")))
    return f"{kind}.traced.{members}.{function}.{numbers[kind, members]}"


def horovod_answers(process_set: Any) -> bool:
    """Whether Horovod itself knows the ranks that are meant.

    Raises:
        ConfigError: for a process set that does not exist here.
    """
    current = session.current()
    if current.scope == "world":
        return True
    if process_set is None or process_set is horovod.global_process_set:
        return False
    raise ConfigError(
        "process_set: in scope 'node' Horovod knows the ranks of one node only. Use "
        "init(horovod_scope='world') for process sets, or horovod.tensorflow's own operations "
        "inside the node."
    )


def named(op: Any) -> str:
    """Our name of Horovod's constant.

    Raises:
        ConfigError: for a reduction that is Horovod's own.
    """
    if op not in OPS:
        raise ConfigError(
            f"op={op}: over the world in scope 'node' there are Average, Sum, Min, Max and "
            "Product. Adasum is Horovod's own: use init(horovod_scope='world')."
        )
    return OPS[op]


def world_operation(
    kind: str, tensors: Sequence[Any], name: str | None, like: Sequence[Any], **details: Any
) -> list[Any]:
    """Carry out an operation over all ranks.

    Args:
        kind: one of ``requests.KINDS``.
        tensors: its inputs; for ``alltoall`` also the numbers of rows, if they are given.
        name: matches ranks; None for the next number.
        like: the dtypes of the results.
        details: further fields of ``requests.Request``.

    Raises:
        HorovodInternalError: on every rank, where ranks ask for different things; from within a
            graph TensorFlow makes it an error of its own.
    """
    if not tf.executing_eagerly() and name is None:
        name = traced_name(kind)

    def body(*arrays: Array) -> list[Array]:
        return _submit(kind, [np.require(a, requirements="C") for a in arrays], name, details)

    if tf.executing_eagerly():
        return [tf.convert_to_tensor(r) for r in body(*(np.asarray(t) for t in tensors))]
    with tf.device("/cpu:0"):
        results = tf.numpy_function(body, tensors, list(like), stateful=True)
    return list(results) if isinstance(results, list | tuple) else [results]


def _submit(
    kind: str, arrays: list[Array], name: str | None, details: dict[str, Any]
) -> list[Array]:
    operations = session.current().operations
    if kind == "alltoall" and len(arrays) == 2:
        details = {**details, "splits": tuple(int(rows) for rows in arrays.pop())}
    same = kind in ("allreduce", "broadcast")
    flat = [array.reshape(-1) for array in arrays]
    outputs = [np.empty_like(array) for array in flat] if same else []
    shapes = [array.shape for array in arrays]
    label = None if name is None else f"tensorflow.{name}"
    with failing_as(HorovodInternalError):
        results = operations.submit(
            kind, label, flat, shapes, outputs, awaited=True, **details
        ).wait()
    if same:
        return [out.reshape(shape) for out, shape in zip(outputs, shapes, strict=True)]
    rows = [np.asarray(result) for result in results]
    if kind == "alltoall":
        return [rows[0].reshape(-1, *shapes[0][1:]), rows[1].astype(np.int32)]
    return [row.reshape(-1, *shape[1:]) for row, shape in zip(rows, shapes, strict=True)]
