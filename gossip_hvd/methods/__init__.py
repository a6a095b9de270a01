"""The methods, by name: one paper a file, one contract for all."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gossip_hvd.errors import ConfigError, unknown
from gossip_hvd.methods.allreduce import AllReduce
from gossip_hvd.methods.contract import Method
from gossip_hvd.methods.crossover import Crossover
from gossip_hvd.methods.gossip import Gossip

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (AllReduce, Crossover, Gossip)}


def method_of(named: str | Method, **options: Any) -> Method:
    """The method of that name with these options; a method object passes through.

    Args:
        named: a name from ``METHODS`` or a method.
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
            raise unknown(f"option of method {named!r}", name, known or ["(none)"])
    return kind(**options)


__all__ = ["METHODS", "AllReduce", "Crossover", "Gossip", "Method", "method_of"]
