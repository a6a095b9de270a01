"""Horovod's operations on plain values, over the world in both scopes and on every backend."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from gossip_hvd import session
from gossip_hvd.errors import ConfigError
from gossip_hvd.mixing import Array
from gossip_hvd.tensorflow.keras.backend import framework


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Any = None,
    compression: Any = None,
) -> Any:
    """The reduction of a value over all ranks, as the backend's tensor; arguments as Horovod's.

    ``compression`` is accepted: values travel as they are.
    """
    if average is not None and op is not None:
        raise ValueError("The op parameter supersedes average. Please provide only one of them.")
    array = _array(value)
    result = np.empty_like(array)
    _submit(
        "allreduce",
        name,
        array,
        result,
        op=_op("Sum" if average is False else "Average", op),
        prescale=prescale_factor,
        postscale=postscale_factor,
    )
    return _tensor(result)


def allgather(value: Any, name: str | None = None) -> Any:
    """The rows of all ranks, by rank, as the backend's tensor."""
    array = _array(value)
    gathered = _submit("allgather", name, array)
    return _tensor(np.asarray(gathered).reshape(-1, *array.shape[1:]))


def broadcast(value: Any, root_rank: int, name: str | None = None) -> Any:
    """The value of world rank ``root_rank``, as the backend's tensor."""
    array = _array(value)
    result = np.empty_like(array)
    _submit("broadcast", name, array, result, root=root_rank)
    return _tensor(result)


def reducescatter(value: Any, name: str | None = None, op: Any = None) -> Any:
    """This rank's rows of the reduction of a value over all ranks, as the backend's tensor."""
    array = _array(value)
    rows = _submit("reducescatter", name, array, op=_op("Average", op))
    return _tensor(np.asarray(rows).reshape(-1, *array.shape[1:]))


def _array(value: Any) -> Array:
    numpy = getattr(value, "numpy", None)
    array: Array = np.require(value if numpy is None else numpy(), requirements="C")
    return array


def _tensor(array: Array) -> Any:
    """As Horovod returns it: scripts call ``numpy()`` on it."""
    return keras.ops.convert_to_tensor(array)


def _op(default: str, op: Any) -> str:
    """Our name of Horovod's constant."""
    hvd = framework().hvd
    names = ("Average", "Sum", "Min", "Max", "Product")
    found = {getattr(hvd, name): name.lower() for name in names}
    op = getattr(hvd, default) if op is None else op
    if op not in found:
        raise ConfigError(f"op={op}: expected one of {', '.join(names)}.")
    return found[op]


def _submit(
    kind: str, name: str | None, array: Array, result: Array | None = None, **details: Any
) -> Any:
    outputs = None if result is None else [result.reshape(-1)]
    handle = session.current().operations.submit(
        kind,
        None if name is None else f"keras.{name}",
        [array.reshape(-1)],
        [array.shape],
        outputs,
        awaited=True,
        **details,
    )
    return handle.wait()[0]
