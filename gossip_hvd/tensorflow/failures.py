"""Operations of ours fail with Horovod's error: scripts, and elastic ones, catch that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from horovod.common.exceptions import HorovodInternalError

from gossip_hvd.errors import OperationError


@contextmanager
def horovods_error() -> Iterator[None]:
    """Raise ``HorovodInternalError`` where an operation fails."""
    try:
        yield
    except OperationError as error:
        raise HorovodInternalError(str(error)) from error
