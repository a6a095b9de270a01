"""What makes replicas and objects equal on all ranks: variables, models, anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import cloudpickle  # type: ignore[import-untyped]  # Horovod needs it too
import numpy as np
from horovod.common.exceptions import HorovodInternalError

from gossip_hvd import session
from gossip_hvd.agreement import require_agreement
from gossip_hvd.errors import ConfigError, failing_as
from gossip_hvd.gossip import running
from gossip_hvd.variables import VariablesGossip

T = TypeVar("T")


def broadcast_variables(
    variables: Iterable[Any], root_rank: int, process_set: Any = None, inplace: bool = False
) -> None:
    """Overwrite variables, Keras's or TensorFlow's, with those of world rank ``root_rank``.

    Args:
        variables: the same on all ranks.
        root_rank: world rank that has the values to keep.
        process_set: Horovod's argument; refused, since the whole world takes part.
        inplace: Horovod's argument; variables are always overwritten.

    Raises:
        ConfigError: where shapes, dtypes or roots differ between ranks.
    """
    require_everybody(process_set, "broadcast_variables")
    variables = list(variables)
    world = session.current().world
    facts: dict[str, object] = {"root_rank": root_rank, "the number of variables": len(variables)}
    for i, variable in enumerate(variables):
        facts[f"variable {i}"] = f"{tuple(variable.shape)} {_name(variable.dtype)}"
    require_agreement(world, "broadcast_variables", facts)
    settle()
    for variable in variables:
        values = np.array(_values(variable), copy=True, order="C")
        world.broadcast(values.reshape(-1).view(np.uint8), root_rank, "broadcast_variables")
        variable.assign(values)
    _received(world, "broadcast_variables")


def require_everybody(process_set: Any, what: str) -> None:
    """Refuse a process set where the whole world takes part; others would wait for ever.

    Raises:
        ConfigError: says what to do instead.
    """
    if getattr(process_set, "process_set_id", 0):
        raise ConfigError(
            f"{what}: process_set={process_set}: here all ranks take part. Use Horovod's own "
            f"{what} for a process set, in scope 'world'."
        )


def settle() -> None:
    """Finish every exchange in flight: the weights are about to be set from outside."""
    for gossip in running():
        if isinstance(gossip, VariablesGossip) and gossip.begun:
            gossip.drain()


def average_variables(variables: Sequence[Any]) -> None:
    """Replace variables by their exact mean, in place; all ranks must call.

    Every node counts once where a distributed optimizer or tape trains any of them, batch norm's
    moving statistics and whatever else it does not train included; otherwise every rank does.
    Whole numbers stay as they are.
    """
    current = session.current()
    everybody = [g for g in running() if isinstance(g, VariablesGossip) and g.begun]
    ours = [g for g in everybody if any(g.trains(v) for v in variables)]
    for gossip in ours:
        gossip.average_parameters()
    weight = 1.0 / current.world.size
    if ours:
        weight = 1.0 / len(current.cluster.nodes) / len(current.node_ranks)
    for variable in variables:
        if any(gossip.trains(variable) for gossip in ours):
            continue
        values = np.asarray(_values(variable))
        if values.dtype.kind not in "fc" and _name(variable.dtype) != "bfloat16":
            continue
        wide = values.astype(np.complex128 if values.dtype.kind == "c" else np.float64, order="C")
        wide *= weight
        current.world.reduce(wide.reshape(-1), "SUM", "average_variables")
        variable.assign(wide.astype(values.dtype))


def gossip_of(variables: Sequence[Any]) -> VariablesGossip:
    """The gossip that trains these variables: an optimizer's, or a tape's, which has no other name.

    Raises:
        ConfigError: where there is none, or none yet.
    """
    for gossip in reversed(list(running())):
        if isinstance(gossip, VariablesGossip) and any(gossip.trains(v) for v in variables):
            return gossip
    raise ConfigError(
        "no distributed optimizer or tape trains these variables; it learns of them in its first "
        "step."
    )


def broadcast_object(
    obj: T,
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: Any = None,
) -> T:
    """The object of world rank ``root_rank``; pickled, so trust the ranks of your job."""
    require_everybody(process_set, "broadcast_object")
    world = _world()
    mine = world.rank == root_rank
    data = cloudpickle.dumps(obj) if mine else b""
    length = np.array([len(data)], np.int64)
    world.broadcast(length.view(np.uint8), root_rank, "broadcast_object")
    buffer = np.frombuffer(data.ljust(int(length[0]), b"\0"), np.uint8).copy()
    world.broadcast(buffer, root_rank, "broadcast_object")
    _received(world, "broadcast_object")
    received: T = cloudpickle.loads(buffer.tobytes())
    return obj if mine else received


def broadcast_object_fn(
    root_rank: int = 0, session: Any = None, name: str | None = None, process_set: Any = None
) -> Callable[[Any], Any]:
    """``broadcast_object`` for one root, as Horovod's estimators ask for it."""
    return lambda obj: broadcast_object(obj, root_rank, process_set=process_set)


def allgather_object(
    obj: T, session: Any = None, name: str | None = None, process_set: Any = None
) -> list[T]:
    """Every rank's object, by rank; pickled, so trust the ranks of your job."""
    require_everybody(process_set, "allgather_object")
    gathered = _world().allgather(cloudpickle.dumps(obj), "allgather_object")
    return [cloudpickle.loads(data) for data in gathered]


def barrier(process_set: Any = None) -> None:
    """Return when every rank of the world has come here, or has joined.

    Raises:
        HorovodInternalError: where one of them never comes.
    """
    require_everybody(process_set, "barrier")
    with failing_as(HorovodInternalError):
        session.current().operations.submit("barrier", None).wait()


def join(device: int = -1) -> int:
    """Say that this rank is out of data for world-wide operations; the rank that came last.

    Gradients and rounds of gossip know nothing of it: train equally many steps on all ranks.

    Raises:
        HorovodInternalError: where one of the ranks can no longer join.
    """
    with failing_as(HorovodInternalError):
        return session.current().operations.join(lambda _: None)[-1]


def _received(world: Any, what: str) -> None:
    """Return when everybody has what the root sent.

    Else the root, whose part is soon over, might leave, and who still receives would believe that
    it has left without sending.
    """
    world.barrier(what)


def _world() -> Any:
    return session.current().world


def _values(variable: Any) -> Any:
    """A variable's values on the host, whichever framework it belongs to."""
    numpy = getattr(variable, "numpy", None)
    return numpy() if numpy is not None else variable


def _name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype))
