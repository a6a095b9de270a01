"""The checkpoints on one rank's disk: written so that a crash leaves a whole one or none.

Each file is written under another name, synced to the disk, renamed, and its folder synced. The
manifest comes last: a checkpoint without one was never finished. Folders and files are opened by
their own fixed names inside the directory and never through a link, and only their owner may read
them.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from gossip_hvd.checkpoint import manifest, tensors
from gossip_hvd.checkpoint.manifest import Manifest, file_of
from gossip_hvd.checkpoint.tensors import Header, Place
from gossip_hvd.errors import CheckpointError
from gossip_hvd.transport import Bytes

MANIFEST = "manifest.json"
DRAFT = ".draft"
OURS = re.compile(r"(manifest\.json|node\d{4,}\.safetensors)(\.node\d{4,})?(\.draft)?")
PIECE = 1 << 24
"""Bytes that are written, read and hashed at once."""


def name_of(number: int) -> str:
    """The folder of checkpoint ``number``."""
    return f"checkpoint-{number:06d}"


def numbers(directory: Path) -> list[int]:
    """The checkpoints in a directory, whole or not, oldest first."""
    if not directory.exists():
        return []
    found = (re.fullmatch(r"checkpoint-(\d{6,15})", entry.name) for entry in directory.iterdir())
    known = [int(match[1]) for match in found if match]
    return sorted(n for n in known if os.path.lexists(directory / name_of(n)))


# Writing ---------------------------------------------------------------------------------------


class Draft:
    """One node's part of a checkpoint while it is written.

    Args:
        directory: of all checkpoints.
        number: of this one.
        node: whose file it is.
    """

    def __init__(self, directory: Path, number: int, node: int) -> None:
        self._directory, self._node = directory, node
        self._folder = directory / name_of(number)
        self._name = file_of(node)

    def create(self, header: Header) -> None:
        """Make the file with all the room that it needs, and write what stands in front."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with _opened(self._folder) as folder, _created(folder, self._name + DRAFT) as file:
            # A full disk is found out before the first byte is written.
            os.posix_fallocate(file, 0, header.nbytes)
            _write(file, np.frombuffer(header.data, np.uint8), 0)
            os.fsync(file)

    def write(self, pieces: Iterator[tuple[Place, Bytes]]) -> None:
        """Put one rank's tensors into their places; the ranks of a node do so side by side."""
        with (
            _opened(self._folder) as folder,
            _file(folder, self._name + DRAFT, os.O_WRONLY) as file,
        ):
            for place, data in pieces:
                _write(file, data, place.start)
            os.fsync(file)

    def finish(self) -> manifest.File:
        """Give the file its name; returns its size and digest, as read back."""
        with _opened(self._folder) as folder:
            with _file(folder, self._name + DRAFT, os.O_RDONLY) as file:
                found = manifest.File(os.fstat(file).st_size, _digest(file))
            _rename(folder, self._name + DRAFT, self._name)
        _sync(self._directory)
        return found

    def commit(self, whole: Manifest) -> None:
        """Write the manifest: from now on the checkpoint counts."""
        # Where nodes share a disk each writes the same manifest; the last rename stays.
        draft = f"{MANIFEST}.node{self._node:04d}{DRAFT}"
        data = np.frombuffer(whole.text(), np.uint8)
        with _opened(self._folder) as folder:
            with _created(folder, draft) as file:
                _write(file, data, 0)
                os.fsync(file)
            _rename(folder, draft, MANIFEST)
        _sync(self._directory)


def remove(directory: Path, number: int) -> None:
    """Delete a checkpoint, its manifest first; what is not ours stays, and so does its folder."""
    path = directory / name_of(number)
    if not path.is_dir() or path.is_symlink():
        return
    with suppress(FileNotFoundError), _opened(path) as folder:
        ours = [name for name in os.listdir(folder) if OURS.fullmatch(name)]
        for name in sorted(ours):  # "manifest.json" comes before "node…"
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            if name == MANIFEST:
                os.fsync(folder)
    # Another node on the same disk may still be at it, or may have been faster.
    with suppress(OSError):
        path.rmdir()


def finished(directory: Path) -> list[int]:
    """The checkpoints in a directory that have a manifest, oldest first."""
    return [n for n in numbers(directory) if os.path.lexists(directory / name_of(n) / MANIFEST)]


def prune(directory: Path, newest: int, keep: int, everywhere: Collection[int]) -> None:
    """Delete all checkpoints before ``newest`` but the last finished ones.

    Where nodes have disks of their own, some may lack what others have. Then the last ones that
    are finished everywhere are kept too: only they can be gone back to.

    Args:
        directory: of the checkpoints.
        newest: the number of the one that has just been finished.
        keep: how many finished ones to keep, ``newest`` included.
        everywhere: those that are finished on all nodes.
    """
    kept: set[int] = set()
    for known in (finished(directory), everywhere):
        before = sorted(n for n in known if n < newest)
        kept.update(before[max(0, len(before) - (keep - 1)) :])
    for number in (n for n in numbers(directory) if n < newest):
        if number not in kept:
            remove(directory, number)
    _sync(directory)


# Reading ---------------------------------------------------------------------------------------


def read_manifest(directory: Path, number: int) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: where there is none, or one that is damaged or foreign.
    """
    with _readable(directory, number, MANIFEST) as file:
        size = os.fstat(file).st_size
        if size > manifest.LARGEST:
            raise CheckpointError(f"its manifest has {size} bytes.")
        return manifest.parse(_read(file, 0, size).tobytes(), number)


def verify(directory: Path, whole: Manifest, node: int) -> None:
    """Read a node's file through and compare it with the manifest.

    Raises:
        CheckpointError: where it is missing, of another size, or holds other bytes.
    """
    expected = whole.files[node]
    with _readable(directory, whole.number, file_of(node)) as file:
        size = os.fstat(file).st_size
        if size != expected.nbytes:
            raise CheckpointError(
                f"{file_of(node)} has {size} bytes, and its manifest says {expected.nbytes}."
            )
        if _digest(file) != expected.sha256:
            raise CheckpointError(f"{file_of(node)} holds other bytes than its manifest says.")


class Reader:
    """One node's file, open for reading; close it."""

    def __init__(self, directory: Path, number: int, node: int) -> None:
        with _readable(directory, number, file_of(node)) as file:
            size = os.fstat(file).st_size
            length = tensors.header_length(_read(file, 0, min(8, size)).tobytes(), size)
            self.header = tensors.parse(_read(file, 0, length).tobytes(), size)
            self._file = os.dup(file)

    def read(self, name: str) -> Bytes:
        """A tensor's bytes."""
        place = self.header.places[name]
        return _read(self._file, place.start, place.kind.nbytes)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


@contextmanager
def _readable(directory: Path, number: int, name: str) -> Iterator[int]:
    """A file of a checkpoint, or an error that says why it cannot be used."""
    try:
        with _opened(directory / name_of(number)) as folder, _file(folder, name, os.O_RDONLY) as f:
            yield f
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = ": it was never finished" if missing and name == MANIFEST else ""
        raise CheckpointError(f"{name} cannot be read ({error.strerror}){hint}.") from None


# The operating system --------------------------------------------------------------------------


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A folder, which may not be a link."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield number
    finally:
        os.close(number)


@contextmanager
def _file(folder: int, name: str, flags: int, mode: int = 0) -> Iterator[int]:
    """A plain file in a folder, which may be neither link nor pipe nor device."""
    safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    number = os.open(name, flags | safe, mode, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(0, "not a plain file", name)
        yield number
    finally:
        os.close(number)


@contextmanager
def _created(folder: int, name: str) -> Iterator[int]:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    with _file(folder, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600) as file:
        yield file


def _write(file: int, data: Bytes, start: int) -> None:
    rest = data.data
    while rest:
        done = os.pwrite(file, rest[:PIECE], start)
        rest, start = rest[done:], start + done


def _read(file: int, start: int, nbytes: int) -> Bytes:
    found = np.empty(nbytes, np.uint8)
    rest = found.data
    while rest:
        done = os.preadv(file, [rest[:PIECE]], start)
        if not done:
            raise CheckpointError("a file ends before its end.")
        rest, start = rest[done:], start + done
    return found


def _digest(file: int) -> str:
    digest, piece, start = hashlib.sha256(), memoryview(bytearray(PIECE)), 0
    while done := os.preadv(file, [piece], start):
        digest.update(piece[:done])
        start += done
    return digest.hexdigest()


def _rename(folder: int, old: str, new: str) -> None:
    os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def _sync(directory: Path) -> None:
    """Bring a directory's entries to the disk; the directory itself may be a link of the user's."""
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)
