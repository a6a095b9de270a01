"""The arithmetic of mixing: x ← x + Σⱼ wⱼ (rⱼ − s), in blocks that stay in the cache.

``now`` is what the node holds at this moment, ``sent`` what it put on the wire, ``received`` what
its peers put there. Where ``sent`` is ``now`` this is the plain x ← (1 − Σw) x + Σ wⱼ rⱼ and is
computed so. Otherwise (sent earlier, or rounded for the wire) the difference form keeps the mean
over all nodes exact: every s that one node subtracts is an r that another adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 1 << 15
"""Elements of one block: a few of them fit a core's second-level cache."""


@lru_cache(maxsize=32)
def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@lru_cache(maxsize=32)
def name_of(dtype: np.dtype[Any]) -> str:
    """The name of a dtype; NumPy makes it anew each time."""
    return str(dtype)


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which values of ``dtype`` are summed: at least float32."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def combine(
    now: Array, sent: Array, received: Sequence[Array], weights: Sequence[float], out: Array
) -> None:
    """``out ← now + Σⱼ weights[j] · (received[j] − sent)``.

    Args:
        now: 1-D, the values to update.
        sent: 1-D, same length; pass ``now`` itself where nothing changed since the send.
        received: one 1-D array a peer; floating, may be of a smaller dtype than ``now``.
        weights: one a peer, in the same order.
        out: 1-D, same dtype as ``now``; may be ``now``.
    """
    if not received:
        out[...] = now
        return
    fresh = sent is now
    if fresh and now.dtype == np.float32 and len(received) == 1 and received[0].dtype == now.dtype:
        _combine_one(now, received[0], weights[0], out)
        return
    wide = accumulator(now.dtype)
    scratch = np.empty((3, min(BLOCK, now.size)), wide)
    rest = wide.type(1.0 - sum(weights))
    for start in range(0, now.size, BLOCK):
        part = slice(start, min(start + BLOCK, now.size))
        total, term, base = scratch[:, : part.stop - start]
        own = _widen(sent[part], base)
        for i, (values, weight) in enumerate(zip(received, weights, strict=True)):
            target = term if i else total
            theirs = _widen(values[part], term)
            if not fresh:
                theirs = np.subtract(theirs, own, out=target)
            np.multiply(theirs, wide.type(weight), out=target)
            if i:
                np.add(total, term, out=total)
        mine = np.multiply(own, rest, out=base) if fresh else _widen(now[part], base)
        if out.dtype == wide:
            np.add(mine, total, out=out[part])
        else:
            out[part] = np.add(mine, total, out=total)


def _widen(values: Array, scratch: Array) -> Array:
    """The values in the accumulator's dtype: themselves, or a copy of them in ``scratch``."""
    if values.dtype == scratch.dtype:
        return values
    scratch[...] = values
    return scratch


def _combine_one(now: Array, received: Array, weight: float, out: Array) -> None:
    """The common case, one fresh float32 peer, with as few passes as possible."""
    rest, share = np.float32(1.0 - weight), np.float32(weight)
    scratch = np.empty(min(BLOCK, now.size), np.float32)
    for start in range(0, now.size, BLOCK):
        part = slice(start, min(start + BLOCK, now.size))
        mine, theirs, tmp = now[part], received[part], scratch[: part.stop - start]
        if weight == 0.5:
            np.add(mine, theirs, out=tmp)
            np.multiply(tmp, share, out=out[part])
        else:
            np.multiply(theirs, share, out=tmp)
            np.multiply(mine, rest, out=out[part])
            np.add(out[part], tmp, out=out[part])


def mean(values: Sequence[Array], out: Array) -> None:
    """``out ← (1/n) Σ values``, summed in float64 and rounded once.

    Args:
        values: 1-D arrays of one length.
        out: 1-D, same length; may be one of ``values``.
    """
    total = np.empty(min(BLOCK, out.size), np.float64)
    for start in range(0, out.size, BLOCK):
        part = slice(start, min(start + BLOCK, out.size))
        acc = total[: part.stop - start]
        acc[...] = values[0][part]
        for other in values[1:]:
            np.add(acc, other[part], out=acc, dtype=np.float64)
        np.divide(acc, len(values), out=acc)
        out[part] = acc
