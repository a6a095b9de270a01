"""TensorFlow variables' payload slots as flat bytes: copied in and out once a step.

TensorFlow gives variables the memory it likes and moves them when it likes, and a tensor that a
user has read keeps its value for ever; so nothing here shares memory with a variable. While a
training step runs, its values are *lent*: the graph hands over what variables hold at this point
and takes back what has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gossip_hvd.errors import ConfigError
from gossip_hvd.mixing import Array, dtype_of
from gossip_hvd.rounds import WEIGHTS
from gossip_hvd.segments import ALIGN, Field, Layout
from gossip_hvd.transport import Bytes

NAMES = ("float16", "float32", "float64", "bfloat16")
COMPLEX = {"complex64": "float32", "complex128": "float64"}


def field_of(name: str, variable: Any) -> Field:
    """The field of one variable; complex numbers count as pairs.

    Raises:
        ConfigError: for a dtype that cannot be averaged.
    """
    dtype = native(variable).dtype.name
    size = int(np.prod(variable.shape, dtype=np.int64))
    if dtype in COMPLEX:
        dtype, size = COMPLEX[dtype], size * 2
    if dtype not in NAMES:
        raise ConfigError(
            f"variable {name!r} is {dtype}: only floating and complex variables can be averaged. "
            "Make it untrainable."
        )
    return Field(name, dtype, size, dtype_of(dtype).itemsize)


def native(variable: Any) -> Any:
    """TensorFlow's own variable, also of a Keras variable."""
    return variable if isinstance(variable, tf.Variable) else variable.value


class TensorFlowMemory:
    """The flat bytes of one model; see ``memory.Memory``.

    Args:
        layout: of the variables.
        variables: of each slot, in the layout's order; None where a slot has none.
    """

    def __init__(self, layout: Layout, variables: Mapping[str, Sequence[Any]]) -> None:
        self._variables = {s: [_native_or_none(v) for v in vs] for s, vs in variables.items()}
        shapes = [tuple(v.shape) for v in self._variables[WEIGHTS]]
        self._bytes: dict[str, Bytes] = {}
        self._places: dict[str, list[Array]] = {}
        for slot in variables:
            flat = self._bytes[slot] = np.zeros(layout.nbytes, np.uint8)
            self._places[slot] = [
                flat[start : start + f.nbytes].view(_dtype(v)).reshape(shape)
                for f, start, v, shape in zip(
                    layout.fields, layout.offsets, self._variables[WEIGHTS], shapes, strict=True
                )
            ]
        self._lent: dict[str, Mapping[int, Array]] = {}
        self._current: set[str] = set()
        self._changed: set[str] = set()

    def __getitem__(self, slot: str) -> Bytes:
        """The bytes of one slot."""
        return self._bytes[slot]

    def items(self) -> Iterable[tuple[str, Bytes]]:
        """All slots."""
        return self._bytes.items()

    def load(self, slots: Iterable[str]) -> None:
        """Copy tensors into the flat bytes, unless nothing has changed since."""
        for slot in slots:
            if slot in self._current:
                continue
            # The caller may be tracing a graph; variables are read now all the same.
            with tf.init_scope():
                for place, source in self._sources(slot):
                    if source is None:
                        place[...] = 0
                    else:
                        np.copyto(place, source)
            if slot in self._lent:
                self._current.add(slot)

    def save(self, slots: Iterable[str]) -> None:
        """Copy the flat bytes back: at once, or when what was lent is taken back."""
        for slot in slots:
            if slot in self._lent:
                self._changed.add(slot)
                continue
            with tf.init_scope():
                for i, variable in self.variables(slot).items():
                    variable.assign(_apart(self._places[slot][i]))

    def variables(self, slot: str) -> dict[int, Any]:
        """TensorFlow's variables of a slot, by position in the layout."""
        return {i: v for i, v in enumerate(self._variables[slot]) if v is not None}

    def lend(self, values: dict[str, Mapping[int, Array]]) -> None:
        """From now until ``take`` these are the tensors' values, by slot and position."""
        self._lent = values
        self._current.clear()
        self._changed.clear()

    def take(self, slot: str) -> dict[int, Array]:
        """What a lent slot holds now."""
        lent = self._lent[slot]
        if slot not in self._changed:
            return dict(lent)
        return {i: _apart(self._places[slot][i]) for i in lent}

    def end_loan(self) -> None:
        """Variables are read directly again."""
        self._lent = {}
        self._current.clear()
        self._changed.clear()

    def _sources(self, slot: str) -> Iterable[tuple[Array, Array | None]]:
        places = self._places[slot]
        if slot in self._lent:
            lent = self._lent[slot]
            return ((place, lent.get(i)) for i, place in enumerate(places))
        variables = self._variables[slot]
        if not any(v is not None for v in variables):
            return ()
        return (
            (place, None if v is None else np.asarray(v.read_value()))
            for place, v in zip(places, variables, strict=True)
        )


def _native_or_none(variable: Any) -> Any:
    return None if variable is None else native(variable)


def _dtype(variable: Any) -> np.dtype[Any]:
    return dtype_of(variable.dtype.name)


def _apart(values: Array) -> Array:
    """A copy so aligned that TensorFlow adopts it instead of copying it once more."""
    raw = np.empty(values.nbytes + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    copy = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    np.copyto(copy, values)
    return copy
