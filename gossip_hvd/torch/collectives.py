"""World-wide operations on tensors, in both scopes; and what gossip adds to them.

In scope ``world`` Horovod answers. In scope ``node`` Horovod knows one node only, so these go over
MPI directly; all ranks must call them in the same order.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import horovod.torch as horovod
import numpy as np
import torch

from gossip_hvd import session
from gossip_hvd.agreement import require_agreement
from gossip_hvd.errors import ConfigError
from gossip_hvd.gossip import running
from gossip_hvd.torch.memory import flat_bytes
from gossip_hvd.torch.optimizer import TorchGossip

T = TypeVar("T")
Tensors = Mapping[str, Any] | Iterable[tuple[str, torch.Tensor]]
NAMES = {
    horovod.Average: "SUM",
    horovod.Sum: "SUM",
    horovod.Min: "MIN",
    horovod.Max: "MAX",
    horovod.Product: "PROD",
}


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = horovod.Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> torch.Tensor:
    """The reduction of ``tensor`` over all ranks of the world; arguments as Horovod's."""
    current = session.current()
    if current.scope == "world" or process_set is not None:
        return horovod.allreduce(
            tensor,
            average=average,
            name=name,
            compression=compression,
            op=op,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=horovod.global_process_set if process_set is None else process_set,
        )
    result = tensor.detach().clone()
    return allreduce_(result, average, name, op, prescale_factor, postscale_factor)


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
) -> torch.Tensor:
    """As ``allreduce``, in place."""
    current = session.current()
    if current.scope == "world" or process_set is not None:
        return horovod.allreduce_(
            tensor,
            average=average,
            name=name,
            op=op,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=horovod.global_process_set if process_set is None else process_set,
        )
    if op is None:
        op = horovod.Sum if average is False else horovod.Average
    if op not in NAMES:
        raise ConfigError(f"op={op} is not available over the world in scope 'node'.")
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    work = tensor.detach().to("cpu", wide, copy=True).contiguous()
    if prescale_factor != 1.0:
        work.mul_(prescale_factor)
    current.world.reduce(work.reshape(-1).numpy(), NAMES[op], f"allreduce {name or ''}")
    if op == horovod.Average:
        size = current.world.size
        work = work.div(size, rounding_mode=None if work.is_floating_point() else "trunc")
    if postscale_factor != 1.0:
        work.mul_(postscale_factor)
    with torch.no_grad():
        return tensor.copy_(work)


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Overwrite ``tensor`` with the one of world rank ``root_rank``."""
    host = tensor.detach().to("cpu", copy=True).contiguous()
    _broadcast_host(host, root_rank, f"broadcast {name or ''}")
    with torch.no_grad():
        return tensor.copy_(host)


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """A copy of the tensor of world rank ``root_rank``."""
    return broadcast_(tensor.detach().clone(), root_rank, name)


def broadcast_object(obj: T, root_rank: int = 0, name: str | None = None) -> T:
    """The object of world rank ``root_rank``; pickled, so trust the ranks of your job."""
    world = session.current().world
    data = pickle.dumps(obj) if world.rank == root_rank else b""
    length = np.array([len(data)], np.int64)
    world.broadcast(length.view(np.uint8), root_rank, "broadcast_object")
    buffer = np.frombuffer(data.ljust(int(length[0]), b"\0"), np.uint8).copy()
    world.broadcast(buffer, root_rank, "broadcast_object")
    received: T = pickle.loads(buffer.tobytes())
    return obj if world.rank == root_rank else received


def allgather_object(obj: T, name: str | None = None) -> list[T]:
    """Every rank's object, by rank; pickled, so trust the ranks of your job."""
    world = session.current().world
    return [pickle.loads(data) for data in world.allgather(pickle.dumps(obj), "allgather_object")]


def broadcast_parameters(params: Tensors, root_rank: int) -> None:
    """Overwrite tensors with those of ``root_rank``, in place.

    Args:
        params: a ``state_dict()`` or an iterable of (name, tensor), the same on all ranks.
        root_rank: world rank that has the values to keep.

    Raises:
        ConfigError: where names, shapes or dtypes differ between ranks.
        ValueError: where ``params`` is neither.
    """
    tensors = _tensors(params)
    world = session.current().world
    facts = {f"tensor {n!r}": f"{tuple(t.shape)} {t.dtype}" for n, t in tensors}
    facts["the number of tensors"] = str(len(tensors))
    require_agreement(world, "broadcast_parameters", facts)
    for gossip in running():
        gossip.drain()
    with torch.no_grad():
        for name, tensor in tensors:
            host = tensor.detach().to("cpu").contiguous()
            _broadcast_host(host, root_rank, f"broadcast_parameters {name}")
            if host.data_ptr() != tensor.data_ptr():
                tensor.copy_(host)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int) -> None:
    """Give every rank the optimizer state of ``root_rank``: numbers as JSON, tensors as bytes.

    No step is taken to create missing state and nothing is pickled.

    Raises:
        ConfigError: for state that is neither a tensor nor a plain value.
    """
    world = session.current().world
    mine: list[torch.Tensor] = []
    text = b""
    if world.rank == root_rank:
        text = json.dumps(_flatten(optimizer.state_dict(), mine, "state")).encode()
    length = np.array([len(text)], np.int64)
    world.broadcast(length.view(np.uint8), root_rank, "broadcast_optimizer_state")
    buffer = np.frombuffer(text.ljust(int(length[0])), np.uint8).copy()
    world.broadcast(buffer, root_rank, "broadcast_optimizer_state")
    tree = json.loads(buffer.tobytes())
    tensors = mine if world.rank == root_rank else _empty_tensors(tree)
    for tensor in tensors:
        _broadcast_host(tensor, root_rank, "broadcast_optimizer_state")
    if world.rank != root_rank:
        optimizer.load_state_dict(_unflatten(tree, tensors))


def average_parameters(model: torch.nn.Module, *, buffers: bool = False) -> None:
    """Replace a model's weights by their exact mean over nodes, in place; all ranks must call.

    Args:
        model: any model; weights that no distributed optimizer trains are averaged too.
        buffers: also average its floating-point buffers, such as batch-norm statistics.
    """
    mine = [gossip for gossip in running() if isinstance(gossip, TorchGossip)]
    parameters = list(model.parameters())
    rest = [p for p in parameters if not any(gossip.trains(p) for gossip in mine)]
    for gossip in mine:
        if any(gossip.trains(p) for p in parameters):
            gossip.average_parameters()
    rest += list(model.buffers()) if buffers else []
    for tensor in rest:
        if tensor.is_floating_point():
            tensor.data.copy_(_mean(tensor))


def _mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over ranks, summed in double precision and equal on all."""
    current = session.current()
    work = tensor.detach().to("cpu", torch.float64, copy=True).contiguous()
    current.world.reduce(work.reshape(-1).numpy(), "SUM", "average_parameters")
    return work.div_(current.world.size).to(tensor.dtype)


def _broadcast_host(tensor: torch.Tensor, root_rank: int, what: str) -> None:
    session.current().world.broadcast(flat_bytes(tensor), root_rank, what)


def _tensors(params: Tensors) -> list[tuple[str, torch.Tensor]]:
    if isinstance(params, Mapping):
        entries = sorted(params.items())
    elif isinstance(params, Iterable):
        entries = list(params)
    else:
        raise ValueError(f"invalid params of type: {type(params)}")
    return [(name, t) for name, t in entries if isinstance(t, torch.Tensor) and t.numel()]


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
