"""Requests and responses as letters: numbers and values as they are, and the rest as text.

Training asks for the same things again and again, so texts are kept, and what was read from them.
Every field is checked where a text is read for the first time; what ``encode`` does not make is
refused with the sender's rank, before anything is done or room is made for it.

    8 bytes     n, little endian, as are all numbers
    8 n bytes   of each item its order
    8 n bytes   of each item how many bytes of values it has
    the values, without gaps
    the rest    JSON: a list of n items
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from gossip_hvd.errors import ProtocolError
from gossip_hvd.requests import KINDS, OPS, Request, Response
from gossip_hvd.small import is_small, nbytes

DTYPES = frozenset(
    ["bool", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
"""What tensors are made of."""

TENSORS = KINDS[: KINDS.index("barrier")]
NUMBERED = {"join": 2, "steps": 2, "remove_process_set": 1}
"""The operations of tensors, and how many numbers the requests of others have in ``splits``."""

LARGEST = 1 << 48
"""Of a dimension, a count or a rank."""

DEEPEST = 64
"""Dimensions of a tensor."""

T = TypeVar("T", Request, Response)


def encode_requests(requests: Sequence[Request]) -> bytes:
    """A list of requests."""
    text = _text(tuple(one.terms for one in requests))
    return _letter([0] * len(requests), [one.values for one in requests], text)


def decode_requests(sender: int, data: bytes) -> list[Request]:
    """What ``encode_requests`` made.

    Args:
        sender: whose letter it is.
        data: the letter.

    Raises:
        ProtocolError: for anything else; names the sender.
    """
    _, values, known = _opened(sender, data, _requests)
    for (request, size), part in zip(known, values, strict=True):
        # Of a broadcast only the root has values.
        needed = request.kind == "allreduce" or request.root == sender
        if len(part) != size and (part or needed):
            raise _refused(
                sender, data, f"{request.kind} with {len(part)} bytes in place of {size}"
            )
    return [r._replace(values=v) if v else r for (r, _), v in zip(known, values, strict=True)]


def encode_responses(responses: Sequence[Response]) -> bytes:
    """A list of responses."""
    text = _text(tuple((r.request.terms, r.error, r.rows, r.joined) for r in responses))
    return _letter([one.order for one in responses], [one.values for one in responses], text)


def decode_responses(sender: int, data: bytes) -> list[Response]:
    """What ``encode_responses`` made.

    Args:
        sender: whose letter it is.
        data: the letter.

    Raises:
        ProtocolError: for anything else; names the sender.
    """
    orders, values, known = _opened(sender, data, _responses)
    for (response, size), part in zip(known, values, strict=True):
        if len(part) != size:
            kind = response.request.kind
            raise _refused(sender, data, f"{kind} with {len(part)} bytes in place of {size}")
    return [
        one._replace(order=order, values=value)
        for (one, _), order, value in zip(known, orders, values, strict=True)
    ]


def _letter(numbers: Sequence[int], values: Sequence[bytes], text: bytes) -> bytes:
    head = [len(numbers), *numbers, *map(len, values)]
    return b"".join((struct.pack(f"<{len(head)}q", *head), *values, text))


def _opened(
    sender: int, data: bytes, read: Callable[[bytes], tuple[tuple[T, int], ...]]
) -> tuple[tuple[int, ...], list[bytes], tuple[tuple[T, int], ...]]:
    try:
        orders, values, text = _parts(data)
        known = read(text)
        if len(known) != len(values):
            raise ValueError(f"{len(known)} items, and the head says {len(values)}")
    except (ValueError, RecursionError) as error:
        raise _refused(sender, data, str(error)) from None
    return orders, values, known


def _refused(sender: int, data: bytes, why: str) -> ProtocolError:
    return ProtocolError(
        f"rank {sender} sent {len(data)} bytes that are no letter of named operations: {why:.200}. "
        "Give every rank the same gossip_hvd; if they have it, memory or a link is damaged."
    )


def _parts(data: bytes) -> tuple[tuple[int, ...], list[bytes], bytes]:
    if len(data) < 8:
        raise ValueError("too short")
    (count,) = struct.unpack_from("<q", data)
    at = 8 * (1 + 2 * count)
    if not 8 <= at <= len(data):
        raise ValueError(f"a head of {count} items")
    head = struct.unpack_from(f"<{2 * count}q", data, 8)
    lengths = head[count:]
    if min(lengths, default=0) < 0 or at + sum(lengths) > len(data):
        raise ValueError("values of impossible lengths")
    values = []
    for length in lengths:
        values.append(data[at : at + length])
        at += length
    return head[:count], values, data[at:]


@lru_cache(maxsize=512)
def _text(items: tuple[Any, ...]) -> bytes:
    return json.dumps(items, separators=(",", ":")).encode()


@lru_cache(maxsize=256)
def _requests(text: bytes) -> tuple[tuple[Request, int], ...]:
    """Requests, and how many bytes of values each of them has."""
    found = [_request(one) for one in _list(json.loads(text))]
    for one in found:
        if one.kind == "watch" or len(one.splits) != NUMBERED.get(one.kind, len(one.splits)):
            raise ValueError(f"a request of {one.kind} with numbers {one.splits!r}")
    return tuple((one, _size(one)) for one in found)


@lru_cache(maxsize=256)
def _responses(text: bytes) -> tuple[tuple[Response, int], ...]:
    found = [_response(one) for one in _list(json.loads(text))]
    for request in (one.request for one in found):
        if request.kind == "watch" and len(request.splits) != 2:
            raise ValueError(f"a response of watch with numbers {request.splits!r}")
    return tuple((one, 0 if one.error else _size(one.request)) for one in found)


def _size(request: Request) -> int:
    """Bytes of the values that travel with it."""
    if request.kind not in TENSORS:
        return 0
    if len(request.shapes) != len(request.dtypes) or not DTYPES.issuperset(request.dtypes):
        raise ValueError(f"{request.kind} of {len(request.shapes)} times {request.dtypes!r}")
    if request.kind == "alltoall" and len(request.shapes) != 1:
        raise ValueError(f"alltoall of {len(request.shapes)} tensors")
    return sum(nbytes(request)) if is_small(request) else 0


def _request(fields: Any) -> Request:
    kind, name, members, shapes, dtypes, op, root, prescale, postscale, splits = _list(fields, 10)
    return Request(
        _one_of(kind, KINDS),
        _str(name),
        _whole(members),
        tuple(tuple(map(_whole, _list(shape, most=DEEPEST))) for shape in _list(shapes)),
        tuple(map(_str, _list(dtypes))),
        _one_of(op, ("", *OPS)),
        _whole(root, -1),
        _number(prescale),
        _number(postscale),
        # Too few rows are the user's own mistake, of which all ranks are told.
        tuple(_whole(n, -LARGEST) for n in _list(splits)),
    )


def _response(fields: Any) -> Response:
    request, error, rows, joined = _list(fields, 4)
    return Response(
        _request(request),
        _str(error),
        tuple(tuple(map(_whole, _list(row))) for row in _list(rows)),
        tuple(map(_whole, _list(joined))),
    )


def _list(value: Any, length: int | None = None, most: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError(f"{value!r:.40} in place of a list")
    if most is not None and len(value) > most:
        raise ValueError(f"{len(value)} dimensions")
    return value


def _whole(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(f"{value!r:.40} in place of a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) is not float:
        raise ValueError(f"{value!r:.40} in place of a number")
    return value


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} in place of text")
    return value


def _one_of(value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{value!r:.40} in place of one of {', '.join(known)}")
    return str(value)
