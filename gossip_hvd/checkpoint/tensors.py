"""The layout of a file of named tensors: that of safetensors, so that others can read it too.

    8 bytes      N, little endian
    N bytes      JSON: {"__metadata__": {name: text}, name: {"dtype", "shape", "data_offsets"}}
    the rest     the tensors' bytes, without gaps, little endian

Every number in a header is checked before it is used, and nothing in a file is ever run.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gossip_hvd.errors import CheckpointError

ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
    "C128": 16,  # an extension of ours
}
"""Bytes of an element, by safetensors' name of its dtype."""

LARGEST_HEADER = 100_000_000
MOST_DIMENSIONS = 64
METADATA = "__metadata__"


@dataclass(frozen=True)
class Kind:
    """A tensor without its values.

    Attributes:
        dtype: a name from ``ITEMSIZE``.
        shape: of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Place:
    """Where in a file a tensor lies.

    Attributes:
        kind: of the tensor.
        start: its first byte, counted from the file's beginning.
    """

    kind: Kind
    start: int


@dataclass(frozen=True)
class Header:
    """What stands before the tensors.

    Attributes:
        texts: free texts, by name.
        places: of the tensors, by name, in the file's order.
        data: the header itself as bytes, up to the first tensor.
        nbytes: of the whole file.
    """

    texts: Mapping[str, str]
    places: Mapping[str, Place]
    data: bytes
    nbytes: int


def lay_out(kinds: Iterable[tuple[str, Kind]], texts: Mapping[str, str]) -> Header:
    """The header of a file of these tensors, which are laid end to end."""
    entries: dict[str, Any] = {METADATA: dict(texts)}
    starts, end = {}, 0
    for name, kind in kinds:
        stop = end + kind.nbytes
        entries[name] = {
            "dtype": kind.dtype,
            "shape": list(kind.shape),
            "data_offsets": [end, stop],
        }
        starts[name] = Place(kind, end)
        end = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text
    places = {name: Place(p.kind, p.start + len(data)) for name, p in starts.items()}
    return Header(dict(texts), places, data, len(data) + end)


def header_length(first: bytes, nbytes: int) -> int:
    """How many bytes the header of a file has, from its first 8.

    Args:
        first: these 8 bytes.
        nbytes: of the whole file.

    Raises:
        CheckpointError: where the file cannot hold so many.
    """
    length = int.from_bytes(first, "little")
    if len(first) != 8 or length > min(LARGEST_HEADER, nbytes - 8):
        raise CheckpointError(f"a file of {nbytes} bytes cannot have a header of {length}.")
    return 8 + length


def parse(data: bytes, nbytes: int) -> Header:
    """The header of a file.

    Args:
        data: as many bytes of the file as ``header_length`` says.
        nbytes: of the whole file.

    Raises:
        CheckpointError: where anything in it is not as ``lay_out`` makes it.
    """
    try:
        entries = json.loads(data[8:].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is no JSON: {error}.") from None
    if not isinstance(entries, dict):
        raise CheckpointError("the header is no dictionary.")
    texts = entries.pop(METADATA, {})
    if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
        raise CheckpointError("the header's texts are damaged.")
    places, end = {}, len(data)
    for name, entry in entries.items():
        kind = _kind(entry)
        offsets = [end - len(data), end - len(data) + kind.nbytes]
        if entry["data_offsets"] != offsets:
            raise CheckpointError(f"the header's tensors leave gaps or overlap, at {name[:80]!r}.")
        places[name] = Place(kind, end)
        end += kind.nbytes
    if end != nbytes:
        raise CheckpointError(f"the header speaks of {end} bytes, and the file has {nbytes}.")
    return Header(texts, places, data, nbytes)


def _kind(entry: Any) -> Kind:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("the header has an entry that is no tensor.")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise CheckpointError(f"the header has a tensor of dtype {str(dtype)[:40]!r}.")
    short = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS
    if not short or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise CheckpointError("the header has a tensor without a proper shape.")
    return Kind(dtype, tuple(shape))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found
