"""Process sets, which are Horovod's own and so for scope ``world``."""

from __future__ import annotations

from typing import Any

from gossip_hvd import session
from gossip_hvd.errors import ConfigError


def add_process_set(process_set: Any) -> Any:
    """Register a process set, or a list of ranks, with Horovod; all ranks must call.

    Raises:
        ConfigError: in scope ``"node"``.
    """
    return _horovod("add_process_set").add_process_set(process_set)


def remove_process_set(process_set: Any) -> bool:
    """Forget a process set; all ranks must call. True if that was possible.

    Raises:
        ConfigError: in scope ``"node"``.
    """
    return bool(_horovod("remove_process_set").remove_process_set(process_set))


def _horovod(what: str) -> Any:
    """The running Horovod."""
    current = session.current()
    if current.scope == "node":
        raise ConfigError(
            f"{what}: in scope 'node' Horovod knows the ranks of one node only. Use "
            "init(horovod_scope='world', process_sets='dynamic')."
        )
    return next(iter(current.frameworks.values()))
