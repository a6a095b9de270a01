"""A named operation as each rank announces it, and what is wrong where ranks announce differently.

The sentences are Horovod's, so that scripts and people who know them recognise them; names and
ranks are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

REDUCTIONS = ("allreduce", "reducescatter")
KINDS = (
    *REDUCTIONS,
    "allgather",
    "broadcast",
    "alltoall",
    "barrier",
    "join",
    "add_process_set",
    "remove_process_set",
    "shutdown",
    "steps",
    "watch",
)
"""The operations; those after ``alltoall`` carry no tensors. See ``joining`` for the last two."""

OPS = ("sum", "average", "min", "max", "product")
"""The reductions."""

Shape = tuple[int, ...]


class Request(NamedTuple):
    """What one rank wants to do.

    Attributes:
        kind: one of ``KINDS``.
        name: matches the requests of all ranks; at one time a name may be used once.
        members: number of the process set; 0 is the world.
        shapes: of each tensor; a grouped operation has several.
        dtypes: NumPy's names, or ``"bfloat16"``.
        op: one of ``OPS``, for reductions.
        root: world rank that has the values of a broadcast.
        prescale: factor before a reduction.
        postscale: factor after it.
        splits: for ``alltoall``, rows to each rank; for ``add_process_set``, its world ranks; for
            ``remove_process_set``, its number; for ``join`` and ``steps`` the position of the
            first of the steps that ``dtypes`` then names, and how many are known to have joined;
            for ``watch`` who has, and its last step. Empty splits of an alltoall mean equal ones.
        values: those of this rank, where they travel with the request (see ``small``).
    """

    kind: str
    name: str
    members: int = 0
    shapes: tuple[Shape, ...] = ()
    dtypes: tuple[str, ...] = ()
    op: str = ""
    root: int = -1
    prescale: float = 1.0
    postscale: float = 1.0
    splits: tuple[int, ...] = ()
    values: bytes = b""

    @property
    def terms(self) -> tuple[Any, ...]:
        """All fields but the values: what ranks must agree on, and what travels as text."""
        return self[:-1]


PLAIN: dict[str, Callable[[Any], Any]] = {"root": index, "prescale": float, "postscale": float}
"""Fields of a request that callers also give as NumPy's numbers, which cannot travel as text."""


class Response(NamedTuple):
    """What the coordinator tells the ranks of a process set to do next.

    Attributes:
        request: as all agree, without values; its first dimensions are one rank's where they may
            differ.
        error: why nothing is done; empty where all is well.
        rows: for ``allgather`` one row a rank: the first dimension of each tensor; for
            ``alltoall`` one row a rank: its splits; for ``join`` the rank that came last; for
            ``add_process_set`` the new number.
        joined: ranks that are out of data and have announced nothing.
        order: counts the responses of a job; ranks outside a process set miss some. It is 0 for
            an error that only some ranks of the process set are told, or at different times.
        values: the result, where it travels with the response (see ``small``).
    """

    request: Request
    error: str = ""
    rows: tuple[tuple[int, ...], ...] = ()
    joined: tuple[int, ...] = ()
    order: int = 0
    values: bytes = b""


def disagreement(requests: Mapping[int, Request], ranks: Sequence[int]) -> str:
    """What is wrong with one operation; empty where its ranks can go on.

    Args:
        requests: by world rank, what was announced under one name.
        ranks: world ranks of the process set, joined ones included.
    """
    first_rank, first = next(iter(requests.items()))
    terms = first.terms
    for rank, other in requests.items():
        if rank != first_rank and other.terms == terms:
            continue
        wrong = _difference(first, other) or _impossible(other, ranks)
        if wrong:
            return f"{wrong} ({first.kind} {first.name!r}: ranks {first_rank} and {rank}.)"
    absent = [rank for rank in ranks if rank not in requests]
    if absent and first.kind == "alltoall":
        return f"Alltoall is not supported with Join at this time. (rank {absent[0]} has joined.)"
    if first.kind == "broadcast" and first.root in absent:
        return f"Broadcast {first.name!r}: its root, rank {first.root}, has joined."
    return ""


def _difference(a: Request, b: Request) -> str:
    kind = a.kind
    if kind != b.kind:
        return (
            f"Mismatched collective operations: One rank did an {kind}, but another rank did an "
            f"{b.kind}."
        )
    if len(a.shapes) != len(b.shapes):
        return (
            f"Mismatched {kind} groups: One rank sent {len(a.shapes)} tensors, but another rank "
            f"sent {len(b.shapes)}."
        )
    if a.dtypes != b.dtypes:
        one, other = next(pair for pair in zip(a.dtypes, b.dtypes, strict=True) if len({*pair}) > 1)
        return f"Mismatched data types: One rank had type {one}, but another rank had type {other}."
    if a.root != b.root:
        return (
            f"Mismatched {kind} root ranks: One rank specified root rank {a.root}, but another "
            f"rank specified root rank {b.root}."
        )
    if a.op != b.op:
        return f"Mismatched reduction ops: One rank had {a.op}, but another rank had {b.op}."
    if (a.prescale, a.postscale) != (b.prescale, b.postscale):
        return (
            "Mismatched prescale and/or postscale factors: One rank had factors "
            f"({a.prescale}, {a.postscale}), but another rank had ({b.prescale}, {b.postscale})."
        )
    if kind in ("add_process_set", "remove_process_set") and a.splits != b.splits:
        return f"Mismatched process sets: One rank gave {a.splits}, another {b.splits}."
    return _shapes_differ(a, b)


def _shapes_differ(a: Request, b: Request) -> str:
    free = a.kind in ("allgather", "alltoall")  # the first dimension may differ
    for one, other in zip(a.shapes, b.shapes, strict=True):
        if len(one) != len(other) or one[free:] != other[free:]:
            return (
                f"Mismatched {a.kind} tensor shapes: One rank sent a tensor of shape "
                f"{list(one)}, but another rank sent a tensor of shape {list(other)}."
            )
    return ""


def _impossible(request: Request, ranks: Sequence[int]) -> str:
    kind = request.kind
    if kind in ("allgather", "alltoall", "reducescatter") and () in request.shapes:
        return f"A rank tried to {kind} a rank-zero tensor."
    if kind == "add_process_set" and not set(request.splits) <= set(ranks):
        return f"A process set of ranks {list(request.splits)}; there are ranks {list(ranks)}."
    if kind == "broadcast" and request.root not in ranks:
        return f"Broadcast from root rank {request.root}, which is none of ranks {list(ranks)}."
    if kind == "alltoall":
        rows, splits = request.shapes[0][0], request.splits
        if splits and len(splits) != len(ranks):
            return f"Alltoall with {len(splits)} splits for {len(ranks)} ranks."
        if any(n < 0 for n in splits) or sum(splits) > rows:
            return (
                "Sum of splits entries is greater than the first dimension of tensor: splits "
                f"{list(splits)}, first dimension {rows}."
            )
        if not splits and rows % len(ranks):
            return (
                f"Alltoall without splits: the first dimension, {rows}, is not divisible by the "
                f"number of ranks, {len(ranks)}."
            )
    return ""


def agreed(requests: Mapping[int, Request], ranks: Sequence[int]) -> Response:
    """The response to an operation that every rank has announced or joined.

    Args:
        requests: by world rank, what was announced under one name.
        ranks: world ranks of the process set.
    """
    first = Request(*next(iter(requests.values())).terms)
    joined = tuple(rank for rank in ranks if rank not in requests)
    error = disagreement(requests, ranks)
    if error:
        return Response(first._replace(shapes=(), dtypes=()), error, (), joined)
    rows: tuple[tuple[int, ...], ...] = ()
    if first.kind == "allgather":
        none = (0,) * len(first.shapes)
        rows = tuple(
            tuple(shape[0] for shape in requests[rank].shapes) if rank in requests else none
            for rank in ranks
        )
    elif first.kind == "alltoall":
        rows = tuple(
            requests[rank].splits or (requests[rank].shapes[0][0] // len(ranks),) * len(ranks)
            for rank in ranks
        )
    return Response(first, "", rows, joined)
