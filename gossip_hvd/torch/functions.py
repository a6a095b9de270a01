"""What makes replicas and objects equal on all ranks: models, optimizer states, anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import cloudpickle  # type: ignore[import-untyped]  # Horovod needs it too
import numpy as np
import torch

from gossip_hvd import session
from gossip_hvd.agreement import require_agreement
from gossip_hvd.errors import ConfigError
from gossip_hvd.gossip import running
from gossip_hvd.torch.handles import begin, synchronize
from gossip_hvd.torch.process_sets import ProcessSet, global_process_set, horovod_set

T = TypeVar("T")
Tensors = Mapping[str, Any] | Iterable[Any]


def broadcast_object(
    obj: T,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> T:
    """The object of world rank ``root_rank``; pickled, so trust the ranks of your job."""
    mine = session.current().world.rank == root_rank
    data = cloudpickle.dumps(obj) if mine else b""
    received = _broadcast_bytes(data, root_rank, name or "broadcast_object", process_set)
    return obj if mine else cloudpickle.loads(received)


def allgather_object(obj: T, name: str | None = None) -> list[T]:
    """Every rank's object, by rank; pickled, so trust the ranks of your job."""
    gathered = _Gatherer().allgather(cloudpickle.dumps(obj), name or "allgather_object")
    return [cloudpickle.loads(data) for data in gathered]


def broadcast_parameters(params: Tensors, root_rank: int) -> None:
    """Overwrite tensors with those of ``root_rank``, in place.

    Args:
        params: a ``state_dict()``, or an iterable of (name, tensor) or of tensors; the same on
            all ranks.
        root_rank: world rank that has the values to keep.

    Raises:
        ConfigError: where names, shapes or dtypes differ between ranks.
        ValueError: where ``params`` is neither.
    """
    tensors = _tensors(params)
    facts = {f"tensor {n!r}": f"{tuple(t.shape)} {t.dtype}" for n, t in tensors}
    facts["the number of tensors"] = str(len(tensors))
    require_agreement(_Gatherer(), "broadcast_parameters", facts)
    for gossip in running():
        gossip.drain()
    every = [tensor for _, tensor in tensors]
    _broadcast_tensors(every, root_rank, "broadcast_parameters", global_process_set)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Give every rank the optimizer state of ``root_rank``: numbers as JSON, tensors as bytes.

    No step is taken to create missing state and nothing is pickled.

    Args:
        optimizer: any, L-BFGS included, wrapped or not.
        root_rank: world rank that has the state to keep.
        model: Horovod's argument; not needed.

    Raises:
        ConfigError: for state that is neither a tensor nor a plain value.
    """
    broadcast_state(optimizer, root_rank, global_process_set, "broadcast_optimizer_state")


def broadcast_state(
    optimizer: torch.optim.Optimizer, root_rank: int, process_set: Any, name: str
) -> None:
    """``broadcast_optimizer_state`` among the ranks of a process set; all of it must call.

    Args:
        optimizer: likewise.
        root_rank: likewise.
        process_set: the ranks that take part.
        name: of the operations.
    """
    mine = session.current().world.rank == root_rank
    tensors: list[torch.Tensor] = []
    text = b""
    if mine:
        try:
            text = json.dumps(_flatten(optimizer.state_dict(), tensors, "state")).encode()
        except ConfigError as error:
            text = json.dumps({"refused": str(error)}).encode()
    tree = json.loads(_broadcast_bytes(text, root_rank, name, process_set))
    if "refused" in tree:
        raise ConfigError(tree["refused"])
    if not mine:
        tensors = _empty_tensors(tree)
    there = [t for t in tensors if t.numel()]
    _broadcast_tensors(there, root_rank, f"{name}.tensors", process_set)
    if not mine:
        optimizer.load_state_dict(_unflatten(tree, tensors))


class _Gatherer:
    """The named operations as what ``require_agreement`` needs."""

    def __init__(self) -> None:
        self.rank = session.current().world.rank

    def allgather(self, data: bytes, what: str) -> list[bytes]:
        """Every rank's ``data``, by rank."""
        text = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
        length = torch.tensor([len(data)])
        lengths = begin("allgather", [length], f"{what}.sz", global_process_set)
        everything = begin("allgather", [text], f"{what}.t", global_process_set)
        stops = np.cumsum(synchronize(lengths).numpy()).tolist()
        joined = synchronize(everything).numpy()
        return [joined[a:b].tobytes() for a, b in zip([0, *stops], stops, strict=False)]


def _broadcast_bytes(data: bytes, root_rank: int, name: str, process_set: Any) -> bytes:
    how: dict[str, Any] = {"inplace": True, "root": root_rank, "awaited": True}
    length = torch.tensor([len(data)])
    synchronize(begin("broadcast", [length], f"{name}.sz", process_set, **how))
    text = torch.zeros(int(length), dtype=torch.uint8)
    text[: len(data)] = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
    synchronize(begin("broadcast", [text], f"{name}.t", process_set, **how))
    return text.numpy().tobytes()


def _broadcast_tensors(
    tensors: list[torch.Tensor],
    root_rank: int,
    name: str,
    process_set: Any,
) -> None:
    """Overwrite many tensors at once."""
    how: dict[str, Any] = {"inplace": True, "root": root_rank}
    if horovod_set(process_set) is None:
        if tensors:
            synchronize(begin("broadcast", tensors, name, process_set, grouped=True, **how))
        return
    begun = [
        begin("broadcast", [tensor], f"{name}.{i}", process_set, **how)
        for i, tensor in enumerate(tensors)
    ]
    for one in begun:
        synchronize(one)


def _tensors(params: Tensors) -> list[tuple[str, torch.Tensor]]:
    if isinstance(params, Mapping):
        entries: list[Any] = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
        entries = [
            entry if isinstance(entry, tuple) else (str(i), entry) for i, entry in enumerate(params)
        ]
    else:
        raise ValueError(f"invalid params of type: {type(params)}")
    return [(str(name), t) for name, t in entries if isinstance(t, torch.Tensor) and t.numel()]


def _flatten(value: Any, tensors: list[torch.Tensor], where: str) -> Any:
    """Plain JSON in place of nested state; tensors are put aside and numbered."""
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach().to("cpu").contiguous())
        return {"tensor": [list(value.shape), str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, dict):
        return {"dict": [[k, _flatten(v, tensors, f"{where}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_flatten(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
        return {type(value).__name__: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"broadcast_optimizer_state: {where} is a {type(value).__name__}; only tensors, numbers, "
        "strings, lists, tuples and dicts can be sent without pickle."
    )


def _unflatten(tree: Any, tensors: list[torch.Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors.pop(0)
    if kind == "dict":
        return {k: _unflatten(v, tensors) for k, v in content}
    items = [_unflatten(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def _empty_tensors(tree: Any) -> list[torch.Tensor]:
    """Room for every tensor of a flattened state, in order."""
    if not isinstance(tree, dict):
        return []
    ((kind, content),) = tree.items()
    if kind == "tensor":
        shape, dtype = content
        return [torch.empty(shape, dtype=getattr(torch, dtype))]
    children = [v for _, v in content] if kind == "dict" else content
    return [tensor for child in children for tensor in _empty_tensors(child)]
