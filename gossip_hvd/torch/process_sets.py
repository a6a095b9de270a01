"""Process sets: Horovod's in scope ``world``, our own sub-communicators in scope ``node``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import horovod.torch as horovod
from horovod.common import process_sets as horovods

from gossip_hvd import session
from gossip_hvd.errors import ConfigError, OperationError

WORLD = 0


class ProcessSet(horovods.ProcessSet):  # type: ignore[misc]
    """Some ranks that carry out operations among themselves; arguments as Horovod's.

    In scope ``node`` its ranks may be on any nodes; it is made by ``init(process_sets=…)`` or
    ``add_process_set``, with or without ``HOROVOD_DYNAMIC_PROCESS_SETS``.
    """

    def __init__(self, ranks_or_comm: Sequence[int] | Any) -> None:
        super().__init__(ranks_or_comm)

    def size(self) -> int | None:
        """Number of its ranks; None before it is registered."""
        return None if self.process_set_id is None else len(_ranks(self))

    def rank(self) -> int | None:
        """This rank's position in it; None before it is registered.

        Raises:
            ValueError: where this rank is not in it.
        """
        if self.process_set_id is None:
            return None
        ranks, me = _ranks(self), session.current().world.rank
        if me not in ranks:
            raise ValueError("Process is not part of provided process set.")
        return ranks.index(me)

    def included(self) -> bool | None:
        """Whether this rank is in it."""
        if self.ranks is None:
            return None
        return session.current().world.rank in _ranks(self)


class NodeProcessSet(ProcessSet):
    """This rank's node, whose operations are Horovod's in both scopes."""

    def __init__(self, ranks: Iterable[int], inside: Any) -> None:
        super().__init__(list(ranks))
        self.inside = inside
        self.process_set_id = inside.process_set_id


global_process_set = ProcessSet([])
global_process_set.process_set_id = WORLD


def _ranks(members: Any) -> list[int]:
    if members is global_process_set:
        return list(range(session.current().world.size))
    return list(members.ranks)


def is_world(process_set: Any) -> bool:
    """Whether a process set, by whichever name, is the world."""
    return process_set is None or process_set in (global_process_set, horovod.global_process_set)


def horovod_set(process_set: Any) -> Any:
    """What Horovod is to be given; None where the operation is ours.

    Raises:
        ConfigError: for a set that is not registered.
    """
    if isinstance(process_set, NodeProcessSet):
        return process_set.inside
    if session.current().scope == "node":
        return None
    return horovod.global_process_set if is_world(process_set) else process_set


def number_of(process_set: Any) -> int:
    """The number of a set of ours.

    Raises:
        ValueError: for a set that is not registered, or that this rank is not in.
    """
    if is_world(process_set):
        return WORLD
    number = process_set.process_set_id
    if number is None:
        raise ValueError(
            f"{process_set} has not been registered: pass it to init(process_sets=…) or "
            "add_process_set on all ranks."
        )
    if session.current().world.rank not in process_set.ranks:
        raise ValueError(f"Process is not part of provided process set: {process_set}.")
    return int(number)


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Register a new process set; all ranks of the world must call, in the same order.

    Raises:
        ValueError: for a duplicate, or ranks that do not exist.
    """
    current = session.current()
    if current.scope == "world":
        made = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
        node = _node_set(made)
        if node is None:
            return horovod.add_process_set(made)  # type: ignore[no-any-return]
        made.process_set_id = node.process_set_id
        return made
    if not isinstance(process_set, horovods.ProcessSet):
        process_set = ProcessSet(process_set)
    if process_set.ranks is None:
        raise NotImplementedError(
            "Dynamically adding process sets defined by an MPI communicator is not implemented. "
            "Please build the process set via a list of ranks."
        )
    ranks = list(process_set.ranks)
    if (
        not ranks
        or len(set(ranks)) < len(ranks)
        or not 0 <= ranks[0] <= ranks[-1] < current.world.size
    ):
        raise ValueError(f"process set {ranks}: expected different ranks of the world.")
    if len(ranks) == current.world.size:
        raise ValueError(f"Attempted to add a duplicate process set: {process_set}")
    try:
        handle = current.operations.submit("add_process_set", None, splits=tuple(ranks))
        process_set.process_set_id = int(handle.wait()[0][0])
    except OperationError as error:
        raise ValueError(str(error)) from error
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forget a process set; all ranks of the world must call. True if that was possible."""
    current = session.current()
    if current.scope == "world":
        if _node_set(process_set) is None:
            return bool(horovod.remove_process_set(process_set))
        process_set.process_set_id = None
        return True
    number = process_set.process_set_id
    if not number or isinstance(process_set, NodeProcessSet):
        return False
    current.operations.submit("remove_process_set", None, splits=(number,)).wait()
    process_set.process_set_id = None
    return True


def _node_set(process_set: Any) -> Any:
    """Horovod's own set of the same ranks, where they are a node: it takes no ranks twice."""
    return session.current().node_sets["torch"].get(tuple(process_set.ranks or ()))


def register(process_sets: Any) -> None:
    """What ``init`` does with its ``process_sets`` in scope ``node``.

    Raises:
        ConfigError: for anything but process sets of ranks, or ``"dynamic"``.
    """
    if process_sets is None or process_sets == "dynamic":
        return
    for one in process_sets:
        if not isinstance(one, horovods.ProcessSet) or one.ranks is None:
            raise ConfigError(
                f"process_sets: {one!r} is no ProcessSet of a list of ranks, which is what "
                "horovod_scope='node' takes."
            )
        add_process_set(one)


def node_process_set() -> NodeProcessSet | None:
    """The process set of this rank's node; None for a node of one rank."""
    current = session.current()
    inside = current.process_sets["torch"]
    return None if inside is None else NodeProcessSet(current.node_ranks, inside)
