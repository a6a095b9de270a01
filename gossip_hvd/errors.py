"""The errors of this library; each says what happened, where, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GossipError(Exception):
    """Base of every error that this library raises on its own account."""


class ConfigError(GossipError, ValueError):
    """A setting, argument or environment variable that cannot work; raised before training."""


class PlanError(GossipError, RuntimeError):
    """A round that does not fit together: a send without its receive, say."""


class StallError(GossipError, TimeoutError):
    """A wait that outlasted its limit; names rank, round, segment and peer."""


class OperationError(GossipError, RuntimeError):
    """A world-wide operation that ranks asked for differently, or that cannot end."""


class ProtocolError(GossipError, ValueError):
    """A message from another rank that is none of ours: names the rank."""


class PeerLostError(GossipError, ConnectionError):
    """A transfer that the transport reports as failed: the peer or its link is gone."""


class NotFiniteError(GossipError, ArithmeticError):
    """A NaN or an infinity in one node's values, which would spread; names the node."""


class CheckpointError(GossipError, RuntimeError):
    """A checkpoint or saved state that cannot be written, or not be used; names which and why."""


class FailingAs:
    """Raises an error of another kind, Horovod's say, where an operation of ours fails."""

    def __init__(self, kind: type[Exception]) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OperationError):
            raise self._kind(str(error)) from error


failing_as = FailingAs
"""``with failing_as(HorovodInternalError): …``"""


def unknown(what: str, value: object, known: Iterable[str]) -> ConfigError:
    """An error for a name that does not exist, with the nearest one that does.

    Args:
        what: the kind of thing that was named, such as ``"method"``.
        value: what was given.
        known: the names that exist.
    """
    names = sorted(known)
    return ConfigError(
        f"unknown {what} {value!r}: known are {', '.join(names)}{nearest(value, names)}"
    )


def nearest(value: object, known: Iterable[str]) -> str:
    """The end of a sentence: which name may have been meant; a full stop where there is none."""
    near = difflib.get_close_matches(str(value), sorted(known), n=1, cutoff=0.0)
    return f"; did you mean {near[0]!r}?" if near else "."
