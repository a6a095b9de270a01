"""The manifest of a checkpoint: which nodes wrote which files, with sizes and digests."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gossip_hvd import __version__
from gossip_hvd.errors import CheckpointError

FORMAT = "gossip_hvd checkpoint"
VERSION = 1
LARGEST = 64_000_000
"""Bytes of a manifest; real ones have some hundred a node."""


@dataclass(frozen=True)
class File:
    """One node's file.

    Attributes:
        nbytes: its size.
        sha256: its digest, as 64 hexadecimal digits.
    """

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of one checkpoint.

    Attributes:
        number: of the checkpoint; later ones have larger numbers.
        nodes: the world ranks of each node of the job that wrote it.
        files: of each node.
    """

    number: int
    nodes: tuple[tuple[int, ...], ...]
    files: tuple[File, ...]

    def text(self) -> bytes:
        """As it is written; the same bytes on every node."""
        entries = [
            {"name": file_of(i), "bytes": f.nbytes, "sha256": f.sha256}
            for i, f in enumerate(self.files)
        ]
        content = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": f"gossip_hvd {__version__}",
            "number": self.number,
            "nodes": self.nodes,
            "files": entries,
        }
        return (json.dumps(content, indent=1) + "\n").encode()


def file_of(node: int) -> str:
    """The name of a node's file; a manifest cannot name any other."""
    return f"node{node:04d}.safetensors"


def parse(data: bytes, number: int) -> Manifest:
    """The manifest of checkpoint ``number``.

    Raises:
        CheckpointError: for one that is damaged, of another version or of another library.
    """
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its manifest is no JSON: {str(error)[:200]}.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError("its manifest is not that of a gossip_hvd checkpoint.")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"it is of format version {content.get('version')!r:.40}, written by "
            f"{content.get('written_by')!r:.80}; this gossip_hvd reads version {VERSION}."
        )
    if content.get("number") != number:
        raise CheckpointError(f"its manifest is that of checkpoint {content.get('number')!r:.40}.")
    nodes, entries = _nodes(content.get("nodes")), content.get("files")
    if not isinstance(entries, list) or len(entries) != len(nodes):
        raise CheckpointError("its manifest does not name one file a node.")
    return Manifest(number, nodes, tuple(_file(entry, i) for i, entry in enumerate(entries)))


def _nodes(value: Any) -> tuple[tuple[int, ...], ...]:
    whole = isinstance(value, list) and all(isinstance(ranks, list) and ranks for ranks in value)
    ranks = [rank for node in value for rank in node] if whole else []
    if not ranks or any(type(r) is not int for r in ranks) or sorted(ranks) != [*range(len(ranks))]:
        raise CheckpointError("its manifest does not say which ranks its nodes had.")
    return tuple(tuple(node) for node in value)


def _file(entry: Any, node: int) -> File:
    if not isinstance(entry, dict) or entry.get("name") != file_of(node):
        raise CheckpointError(f"its manifest does not name {file_of(node)}.")
    nbytes, digest = entry.get("bytes"), entry.get("sha256")
    if type(nbytes) is not int or nbytes < 0:
        raise CheckpointError(f"its manifest gives no size of {file_of(node)}.")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError(f"its manifest gives no digest of {file_of(node)}.")
    return File(nbytes, digest)
