"""The table of methods by name, filled by the files of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from gossip_hvd.errors import ConfigError, unknown
from gossip_hvd.methods.contract import Method

METHODS: dict[str, type[Method]] = {}
"""Every method by its name."""

M = TypeVar("M", bound=Method)


def registered(kind: type[M]) -> type[M]:
    """Enter a method into the table."""
    METHODS[kind.name] = kind
    return kind


def method_of(named: str | Method, beside: Sequence[str] = (), **options: Any) -> Method:
    """The method of that name with these options; a method object passes through.

    Args:
        named: a name from ``METHODS`` or a method.
        beside: names of options that others take, for the hint of an error.
        options: the method's own options.

    Raises:
        ConfigError: for an unknown name or option, with the nearest that exists.
    """
    if isinstance(named, Method):
        if options:
            raise ConfigError(
                f"options {sorted(options)} beside a method object: set them on {named!r}."
            )
        return named
    kind = METHODS.get(named)
    if kind is None:
        raise unknown("method", named, METHODS)
    known = [f.name for f in fields(kind)]
    for name in options:
        if name not in known:
            raise unknown(f"option of method {named!r}", name, [*known, *beside] or ["(none)"])
    return kind(**options)
