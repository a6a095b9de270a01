"""Operations so small that their values travel inside the letters that agree on them.

An all-reduce or a broadcast of a few numbers then costs one letter to rank 0 and one back: rank 0
has all values when it knows that everybody has asked, and its answer holds the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod

import numpy as np

from gossip_hvd.mixing import Array, dtype_of
from gossip_hvd.reductions import combine, scale
from gossip_hvd.requests import Request, Response, Shape

FEW = 1024
"""Bytes of an operation up to which it travels so; letters stay far below MPI's eager limit."""


def nbytes(request: Request) -> tuple[int, ...]:
    """Bytes of each tensor of an operation."""
    return _nbytes(request.shapes, request.dtypes)


@lru_cache(maxsize=1024)
def _nbytes(shapes: tuple[Shape, ...], dtypes: tuple[str, ...]) -> tuple[int, ...]:
    each = zip(shapes, dtypes, strict=True)
    return tuple(prod(shape) * dtype_of(dtype).itemsize for shape, dtype in each)


def is_small(request: Request) -> bool:
    """Whether an operation's values travel in letters; says the same on every rank."""
    return request.kind in ("allreduce", "broadcast") and 0 < sum(nbytes(request)) <= FEW


def packed(request: Request, inputs: Sequence[Array], rank: int) -> Request:
    """A request with this rank's values, where they travel with it."""
    if not is_small(request) or (request.kind == "broadcast" and request.root != rank):
        return request
    return request._replace(values=b"".join(array.tobytes() for array in inputs))


def answered(response: Response, requests: Mapping[int, Request], size: int) -> Response:
    """A response with the result, where all values have come with the requests.

    Args:
        response: as all agree.
        requests: by world rank; a rank that has joined has none.
        size: number of ranks of the process set, for means.
    """
    request = response.request
    if response.error or not is_small(request):
        return response
    if request.kind == "broadcast":
        return response._replace(values=requests[request.root].values)
    rows = [_unpacked(request, bytearray(requests[rank].values)) for rank in sorted(requests)]
    results = []
    for parts in zip(*rows, strict=True):
        for part in parts:
            scale(part, request.prescale)
        combine(request.op, parts, parts[0])
        scale(parts[0], request.postscale, size if request.op == "average" else 1)
        results.append(parts[0].tobytes())
    return response._replace(values=b"".join(results))


def deliver(response: Response, outputs: Sequence[Array]) -> None:
    """Write the result of a response where it was asked for."""
    for target, values in zip(outputs, _unpacked(response.request, response.values), strict=True):
        target[...] = values


def _unpacked(request: Request, values: bytes | bytearray) -> Iterator[Array]:
    """Each tensor, where its values lie."""
    start = 0
    for dtype, size in zip(request.dtypes, nbytes(request), strict=True):
        kind = dtype_of(dtype)
        yield np.frombuffer(values, kind, size // kind.itemsize, start)
        start += size
