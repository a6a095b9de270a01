"""TensorFlow as ``variables.Framework``: Horovod's operations and rounds, in the graph.

In a graph a round is one ``numpy_function``: it is given what variables hold after the local step
and returns what they shall hold. So the graph itself orders it between this step and the next,
in whatever loop, condition or ``steps_per_execution`` it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from gossip_hvd.errors import ConfigError
from gossip_hvd.memory import Memory
from gossip_hvd.rounds import GRADIENTS
from gossip_hvd.segments import Field, Layout
from gossip_hvd.tensorflow.memory import TensorFlowMemory, field_of, native
from gossip_hvd.variables import Action, NodeAverage

HOROVODS = (tf.float16, tf.float32, tf.float64)


class TensorFlow:
    """See ``variables.Framework``."""

    name = "tensorflow"
    hvd = horovod

    def untraced(self, function: Action) -> Action:
        """The function, which AutoGraph leaves as it is; what it does is traced all the same."""
        plain: Action = tf.autograph.experimental.do_not_convert(function)
        return plain

    def key(self, variable: Any) -> object:
        """What identifies a variable."""
        return native(variable)._unique_id

    def field(self, name: str, variable: Any) -> Field:
        """The variable's place in a flat buffer."""
        return field_of(name, variable)

    def memory(self, layout: Layout, variables: Mapping[str, Sequence[Any]]) -> TensorFlowMemory:
        """The flat bytes of each slot."""
        return TensorFlowMemory(layout, variables)

    def filled(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Sequence[Any]:
        """Nothing to do: a graph has the same gradients on every rank."""
        return gradients

    def average(self, gradients: Sequence[Any], how: NodeAverage) -> list[Any]:
        """The gradients averaged over the node; names are ours, so that layers' do not matter."""
        refuse_xla()
        if how.sparse_as_dense:
            gradients = [tf.convert_to_tensor(g) for g in gradients]
        result = list(gradients)
        if how.process_set is not None:
            dense = [i for i, g in enumerate(gradients) if not isinstance(g, tf.IndexedSlices)]
            for i in set(range(len(gradients))) - set(dense):
                result[i] = _gather_slices(gradients[i], how, i)
            for group in _groups(dense, how.groups):
                reduced = _reduce([gradients[i] for i in group], how, f"{how.prefix}_{group[0]}")
                for i, gradient in zip(group, reduced, strict=True):
                    result[i] = gradient
        if how.factor != 1.0:
            result = [_scaled(gradient, how.factor) for gradient in result]
        return result

    def average_number(self, number: Any, how: NodeAverage) -> Any:
        """One number averaged over the node."""
        number = tf.cast(number, tf.float32)
        if how.process_set is None:
            return number
        return horovod.allreduce(
            number,
            op=horovod.Average,
            name=f"{how.prefix}_number",
            ignore_name_scope=True,
            process_set=how.process_set,
        )

    def run(
        self,
        memory: Memory,
        slots: Sequence[str],
        action: Action,
        numbers: Sequence[Any] = (),
        gradients: Mapping[int, Any] | None = None,
    ) -> dict[int, Any]:
        """Call ``action``, now or when the graph comes to this point."""
        refuse_xla()
        assert isinstance(memory, TensorFlowMemory)
        tensors: list[Any] = [tf.convert_to_tensor(number) for number in numbers]
        places: list[tuple[str, int]] = []
        for slot in slots:
            values = {i: v.read_value() for i, v in memory.variables(slot).items()}
            if slot == GRADIENTS:
                values = {i: tf.convert_to_tensor(g) for i, g in (gradients or {}).items()}
            places += [(slot, i) for i in values]
            tensors += values.values()

        def body(*arrays: Any) -> list[Any]:
            said, held = arrays[: len(numbers)], arrays[len(numbers) :]
            values: dict[str, dict[int, Any]] = {slot: {} for slot in slots}
            for (slot, i), array in zip(places, held, strict=True):
                values[slot][i] = array
            memory.lend(values)  # type: ignore[arg-type]
            try:
                action(*(float(number) for number in said))
                taken = {slot: memory.take(slot) for slot in slots}
            finally:
                memory.end_loan()
            return [taken[slot][i] for slot, i in places]

        results = _call(body, tensors, tensors[len(numbers) :])
        changed: dict[int, Any] = {}
        for (slot, i), value in zip(places, results, strict=True):
            if slot == GRADIENTS:
                changed[i] = value
            else:
                memory.variables(slot)[i].assign(value)
        return changed


def refuse_xla() -> None:
    """Raise while a graph is traced that XLA would compile.

    Raises:
        ConfigError: says what to do.
    """
    if not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    ):
        raise ConfigError(
            "XLA cannot compile this training step: gradients and weights leave the graph for "
            "other ranks. Use model.compile(..., jit_compile=False), or tf.function without "
            "jit_compile."
        )


def _call(body: Any, tensors: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """The body's results, of the shapes and dtypes of ``like``."""
    if tf.executing_eagerly():
        return [tf.convert_to_tensor(a) for a in body(*(np.asarray(t) for t in tensors))]
    with tf.device("/cpu:0"):
        results = tf.numpy_function(body, tensors, [t.dtype for t in like], stateful=True)
    results = list(results) if isinstance(results, list | tuple) else [results] * bool(like)
    return [tf.ensure_shape(r, t.shape) for r, t in zip(results, like, strict=True)]


def _groups(positions: Sequence[int], groups: int | tuple[tuple[Any, ...], ...]) -> list[list[int]]:
    """As Horovod groups: each on its own, so that early gradients leave early, or as asked.

    Operations that are called one by one, outside a graph, wait for each other; there one group
    is what is fast.
    """
    if not isinstance(groups, int):
        asked = [[i for i in group if i in positions] for group in groups]
        rest = [[i] for i in positions if not any(i in group for group in asked)]
        return [group for group in [*asked, *rest] if group]
    if groups == 0:
        groups = 1 if tf.executing_eagerly() else len(positions)
    cuts = [i * len(positions) // max(groups, 1) for i in range(groups + 1)]
    return [list(positions[a:b]) for a, b in pairwise(cuts) if b > a]


def _reduce(gradients: Sequence[Any], how: NodeAverage, name: str) -> list[Any]:
    wide = [_wide(g) for g in gradients]
    average = how.op == horovod.Average
    packed, contexts = zip(*(how.compression.compress(g) for g in wide), strict=True)
    arguments: dict[str, Any] = {
        "op": how.op,
        "prescale_factor": 1.0 / how.predivide if average else 1.0,
        "postscale_factor": how.predivide if average else 1.0,
        "process_set": how.process_set,
        "ignore_name_scope": True,
        "name": name,
    }
    if len(packed) == 1:
        reduced = [horovod.allreduce(packed[0], **arguments)]
    else:
        reduced = horovod.grouped_allreduce(list(packed), **arguments)
    unpacked = map(how.compression.decompress, reduced, contexts)
    return [_narrow(r, g.dtype) for r, g in zip(unpacked, gradients, strict=True)]


def _wide(tensor: Any) -> Any:
    """In a dtype that Horovod can reduce; a complex number as a pair."""
    if tensor.dtype.is_complex:
        return tf.bitcast(tensor, tensor.dtype.real_dtype)
    return tensor if tensor.dtype in HOROVODS else tf.cast(tensor, tf.float32)


def _narrow(tensor: Any, dtype: Any) -> Any:
    """The inverse of ``_wide``."""
    return tf.bitcast(tensor, dtype) if dtype.is_complex else tf.cast(tensor, dtype)


def _gather_slices(gradient: Any, how: NodeAverage, number: int) -> Any:
    """Every rank's rows one behind the other; repeated rows are added when they are applied."""
    arguments = {"process_set": how.process_set, "ignore_name_scope": True}
    values = gradient.values
    name = f"{how.prefix}_{number}"
    gathered = horovod.allgather(_wide(values), name=f"{name}_values", **arguments)
    indices = horovod.allgather(gradient.indices, name=f"{name}_indices", **arguments)
    if how.op == horovod.Average:
        gathered /= how.process_set.size()
    return tf.IndexedSlices(_narrow(gathered, values.dtype), indices, gradient.dense_shape)


def _scaled(gradient: Any, factor: float) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(factor, gradient.dtype)
