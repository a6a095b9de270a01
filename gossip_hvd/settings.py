"""Environment variables: their names, their types, their defaults; arguments beat them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gossip_hvd.errors import ConfigError, nearest, unknown
from gossip_hvd.methods import METHODS

PREFIX = "GOSSIP_HVD_"

LONGEST = 1e9
"""Seconds: thirty years, which every clock can still wait."""


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        parse: from text; a ValueError means bad text.
        default: used where neither argument nor environment says anything.
        expected: what a good value is, for errors and documents.
        meaning: one line.
        names: the good values, where they are names.
    """

    parse: Callable[[str], Any]
    default: Any
    expected: str
    meaning: str
    names: Collection[str] = ()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= LONGEST:
        raise ValueError(text)
    return value


def _patience(text: str) -> float:
    return float("inf") if text == "never" else _seconds(text)


def _folder(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


def _name_of(known: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(text)
        return text

    return parse


SCOPES = ("node", "world")

VARIABLES: dict[str, Variable] = {
    "SCOPE": Variable(_name_of(SCOPES), "node", " or ".join(SCOPES), "where Horovod lives", SCOPES),
    "NODE_SIZE": Variable(_positive, None, "a number of ranks", "ranks of a virtual node"),
    "METHOD": Variable(
        _name_of(METHODS),
        "crossover",
        f"one of {', '.join(sorted(METHODS))}",
        "how nodes train together",
        METHODS,
    ),
    "SEED": Variable(int, 0, "an integer", "seed of every random choice of peers"),
    "STALL_WARNING": Variable(
        _seconds, 60.0, "a number of seconds", "after how long a wait without progress is named"
    ),
    "STALL_TIMEOUT": Variable(
        _patience, 300.0, "a number of seconds, or never", "after how long it ends the job"
    ),
    "SHUTDOWN_TIMEOUT": Variable(
        _patience,
        3600.0,
        "a number of seconds, or never",
        "how long a rank that has ended waits for others",
    ),
    "RECORD_DIR": Variable(
        _folder, None, "a directory", "where ranks write their last transfers when a job ends badly"
    ),
}


def setting(name: str, argument: Any = None, environ: Mapping[str, str] | None = None) -> Any:
    """The value of a setting: the argument, else the environment's, else the default.

    Args:
        name: without the prefix, such as ``"SCOPE"``.
        argument: what the caller was given; None where nothing was.
        environ: instead of ``os.environ``.

    Raises:
        ConfigError: where the environment's text is not of the expected kind.
    """
    variable = VARIABLES[name]
    if argument is not None:
        return argument
    text = (os.environ if environ is None else environ).get(PREFIX + name)
    if text is None:
        return variable.default
    try:
        return variable.parse(text)
    except ValueError:
        raise ConfigError(
            f"{PREFIX}{name}={text!r:.100}: expected {variable.expected}"
            f"{nearest(text[:100], variable.names)} Correct or unset the environment variable."
        ) from None


def refuse_unknown(environ: Mapping[str, str] | None = None) -> None:
    """Raise for a variable with our prefix that does not exist, naming the nearest that does."""
    for key in os.environ if environ is None else environ:
        if key.startswith(PREFIX) and key[len(PREFIX) :] not in VARIABLES:
            raise unknown("environment variable", key, [PREFIX + name for name in VARIABLES])
