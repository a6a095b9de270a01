"""The arithmetic of reductions: sum, mean, minimum, maximum and product of one array a rank.

Arrays are combined in the order of ranks, so the result does not depend on who computes it.
16-bit floats are combined in float32, everything else in its own dtype. What is too large becomes
infinite without a word, as it does in MPI and in Horovod.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gossip_hvd.mixing import BLOCK, Array

UFUNCS = {
    "sum": np.add,
    "average": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "product": np.multiply,
}


@np.errstate(over="ignore", invalid="ignore")
def combine(op: str, rows: Sequence[Array], out: Array) -> None:
    """``out ← rows[0] ∘ rows[1] ∘ …``; a mean is only summed here, see ``scale``.

    Args:
        op: one of ``requests.OPS``.
        rows: 1-D, of one length and dtype.
        out: may be the first row, and no other.
    """
    ufunc = UFUNCS[op]
    if out.dtype.itemsize != 2 or out.dtype.kind in "iu":
        if len(rows) == 1:
            if rows[0] is not out:
                np.copyto(out, rows[0])
            return
        ufunc(rows[0], rows[1], out=out)
        for row in rows[2:]:
            ufunc(out, row, out=out)
        return
    wide = np.empty((2, min(BLOCK, out.size)), np.float32)
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        total, term = wide[:, : stop - start]
        total[...] = rows[0][start:stop]
        for row in rows[1:]:
            term[...] = row[start:stop]
            ufunc(total, term, out=total)
        out[start:stop] = total


def scale(values: Array, factor: float, divisor: int = 1) -> None:
    """``values ← values · factor / divisor``, in place; whole numbers lose their fraction."""
    if factor != 1.0 or divisor != 1:
        _scale(values, factor, divisor)


@np.errstate(over="ignore", invalid="ignore")
def _scale(values: Array, factor: float, divisor: int) -> None:
    if values.dtype.kind in "fc" and values.dtype.itemsize > 2:
        values *= values.dtype.type(factor / divisor)
        return
    wide = np.float32 if values.dtype.itemsize == 2 and values.dtype.kind not in "iu" else float
    for start in range(0, values.size, BLOCK):
        part = values[start : start + BLOCK]
        # Divided, not multiplied by the inverse: 49 · (1/49) is less than 1.
        part[...] = (part.astype(wide) * factor / divisor).astype(part.dtype)


def neutral(op: str, out: Array) -> None:
    """Fill an array with what changes nothing: the share of a rank that has joined."""
    if op in ("sum", "average"):
        out.fill(0)
    elif op == "product":
        out.fill(1)
    elif out.dtype.kind == "b":
        out.fill(op == "min")
    elif out.dtype.kind in "iu":
        limits = np.iinfo(out.dtype)
        out.fill(limits.max if op == "min" else limits.min)
    else:
        out.fill(np.inf if op == "min" else -np.inf)
