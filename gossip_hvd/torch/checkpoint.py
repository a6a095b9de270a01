"""``save_checkpoint`` and ``restore``: a job goes on to the bit where it was stopped.

    path = hvd.save_checkpoint("run1", model=model, optimizer=optimizer, extra={"epoch": 3})
    ...
    found = hvd.restore("run1", model=model, optimizer=optimizer)
    epoch = found.extra["epoch"] + 1 if found else 0

See docs/checkpoints.md. Files are plain tensors and JSON; nothing is unpickled.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossip_hvd import session
from gossip_hvd.checkpoint import job
from gossip_hvd.checkpoint.job import RESTORE, Content, Found, Party, Tensor
from gossip_hvd.checkpoint.merge import Merge
from gossip_hvd.checkpoint.tensors import Kind
from gossip_hvd.checkpoint.trees import flatten
from gossip_hvd.errors import CheckpointError, ConfigError
from gossip_hvd.torch.gossip import TorchGossip

log = logging.getLogger("gossip_hvd")

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "C128": torch.complex128,
}
"""PyTorch's dtypes by safetensors' names."""

PARTS = ("model", "optimizer", "gossip")
"""Parts of the state, each with entries by name."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

Model = torch.nn.Module
Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Restored:
    """What ``restore`` has found.

    Attributes:
        path: the checkpoint.
        extra: as it was given to ``save_checkpoint`` on this rank; on rank 0 where the nodes were
            merged.
        merged: whether all nodes start from their mean.
        rounds: of gossip so far, by optimizer.
    """

    path: Path
    extra: Any
    merged: bool
    rounds: Mapping[str, int]


def save_checkpoint(
    directory: str | Path,
    *,
    model: Model | Mapping[str, Model] | None = None,
    optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
    extra: Any = None,
    keep: int = 3,
    drain: bool = False,
) -> Path:
    """Write a checkpoint of the whole job between two steps; all ranks must call.

    Args:
        directory: of the checkpoints, one for all nodes or one on each.
        model: a model, or several by name.
        optimizer: an optimizer, distributed or not, or several by name.
        extra: of this rank: tensors, numbers, strings, lists, tuples, dictionaries.
        keep: how many finished checkpoints to keep.
        drain: land the exchange in flight first instead of saving it with the rest.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, where one cannot write or has state that is not plain;
            older checkpoints stay as they were.
    """
    if keep < 1:
        raise ConfigError(f"keep={keep}: expected 1 checkpoint or more.")
    models, optimizers = _by_name(model), _by_name(optimizer)
    gossip = {name: one.state_dict(drain=drain) for name, one in _gossips(optimizers).items()}

    def content() -> Content:
        state = {
            "model": {name: one.state_dict() for name, one in models.items()},
            "optimizer": {name: one.state_dict() for name, one in optimizers.items()},
            "gossip": gossip,
            "random": _generators(),
            "extra": extra,
        }
        tree, named = flatten(state, torch.Tensor)
        return Content(tree, [n.name for n in named], [_tensor(n.tensor, n.name) for n in named])

    with _patience() as party:
        path = job.save(party, Path(directory), content, keep)
    if party.world.rank == 0:
        log.info("gossip_hvd: saved %s", path)
    return path


def restore(
    directory: str | Path,
    *,
    model: Model | Mapping[str, Model] | None = None,
    optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
    merge: bool = False,
) -> Restored | None:
    """Go on from the newest checkpoint that is whole on every node; all ranks must call.

    Build model and optimizer as they were, ``DistributedOptimizer`` included. With the same nodes
    the job goes on to the bit. With others every node starts from the mean of the old nodes'
    weights and of their optimizers' histories, and the method begins again.

    Args:
        directory: of the checkpoints.
        model: as for ``save_checkpoint``.
        optimizer: likewise.
        merge: start from the mean with the same nodes too, for another method or other options.

    Returns:
        What was found; None where there is no checkpoint.

    Raises:
        CheckpointError: on every rank, where there are checkpoints and none is whole, or where
            the newest whole one does not fit.
    """
    models, optimizers = _by_name(model), _by_name(optimizer)
    gossips = _gossips(optimizers)
    for gossip in gossips.values():
        gossip.drain()
    with _patience() as party:
        found = job.newest(party, Path(directory))
        if found is None:
            return None
        merged = merge or not found.fits(party.cluster)
        if merged:
            state = party.together(RESTORE, lambda: _mean(found, models, optimizers))
        else:
            state = party.together(
                RESTORE, lambda: job.state_of(found, party.node, party.place, _made)
            )
        party.together(RESTORE, lambda: _load(state, models, optimizers))
    rounds = {}
    for name, gossip in gossips.items():
        if merged:
            gossip.begin_at(state["gossip"].get(name, 0))
        else:
            gossip.load_state_dict(state["gossip"].get(name, {}))
        rounds[name] = gossip.round
    if not merged:
        party.together(RESTORE, lambda: _set_generators(state["random"]))
    _say(party, found, merged)
    return Restored(found.path, state["extra"], merged, rounds)


def _say(party: Party, found: Found, merged: bool) -> None:
    if party.world.rank:
        return
    if not merged:
        log.info("gossip_hvd: restored %s", found.path)
        return
    log.warning(
        "gossip_hvd: %s was written by %d nodes, this job has %d: every node starts from the mean "
        "of their weights and of their optimizers' histories, methods begin again at their round, "
        "random generators stay as they are, and `extra` is rank 0's.",
        found.path,
        len(found.whole.nodes),
        len(party.cluster.nodes),
    )


def _mean(found: Found, models: Mapping[str, Any], optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a job of another shape: the mean where there is one, else the first rank's."""
    files = Merge(found)
    try:
        gossip = files.plain(["gossip"])
        masses = _masses(gossip)
        return {
            "model": {n: files.mean(["model", n], masses, _made) for n in models},
            "optimizer": {
                n: files.mean(["optimizer", n], [1.0] * len(masses), _made) for n in optimizers
            },
            "gossip": {n: s.get("round") for n, s in gossip[0].items() if isinstance(s, dict)},
            "extra": files.first(["extra"], _made),
        }
    finally:
        files.close()


def _masses(gossip: list[Any]) -> list[float]:
    """How much each old rank's node counts."""
    try:
        every = [{float(s["mass"]) for s in rank.values()} or {1.0} for rank in gossip]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError("the saved gossip does not say how its nodes count.") from None
    if any(len(masses) != 1 for masses in every):
        raise CheckpointError(
            "several optimizers count their nodes differently (method 'sgp'), so their models "
            "have no common mean: restore with as many nodes as before."
        )
    return [mass for masses in every for mass in masses]


def _load(state: Any, models: Mapping[str, Model], optimizers: Mapping[str, Optimizer]) -> None:
    """Give models and optimizers what was saved."""
    whole = isinstance(state, dict) and "extra" in state
    if not whole or not all(isinstance(state.get(part), dict) for part in PARTS):
        raise CheckpointError("the file is not one of save_checkpoint's.")
    for what, things in (("model", models), ("optimizer", optimizers)):
        if not set(things) <= set(state[what]):
            raise CheckpointError(
                f"it holds {what}s {sorted(state[what])}, asked for are {sorted(things)}."
            )
        for name, thing in things.items():
            try:
                thing.load_state_dict(state[what][name])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"the saved {what} does not fit: {error}") from None


def _by_name(things: Any) -> dict[str, Any]:
    if things is None:
        return {}
    return dict(things) if isinstance(things, Mapping) else {"": things}


def _gossips(optimizers: Mapping[str, Any]) -> dict[str, TorchGossip]:
    return {n: o.gossip for n, o in optimizers.items() if hasattr(o, "gossip")}


@contextmanager
def _patience() -> Iterator[Party]:
    """This rank among all; a disk may take longer than a wait for the network."""
    current = session.current()
    with current.patient():
        yield Party(current.world, current.cluster)


# Tensors as bytes --------------------------------------------------------------------------------


def _tensor(tensor: torch.Tensor, name: str) -> Tensor:
    if tensor.dtype not in NAMES or tensor.layout != torch.strided:
        raise CheckpointError(f"{name} is a {tensor.type()}, which has no place in a checkpoint.")
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy()
    return Tensor(Kind(NAMES[tensor.dtype], tuple(tensor.shape)), data)


def _made(tensor: Tensor) -> torch.Tensor:
    dtype = DTYPES[tensor.kind.dtype]
    if not tensor.data.size:  # has no stride in PyTorch, and so no view of another dtype
        return torch.empty(tensor.kind.shape, dtype=dtype)
    return torch.from_numpy(tensor.data).view(dtype).reshape(tensor.kind.shape)


# Random generators -------------------------------------------------------------------------------


def _generators() -> dict[str, Any]:
    """The states of this process's global generators."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    old = np.random.get_state(legacy=True)
    if isinstance(old, tuple):
        state["numpy"] = [part.tolist() if isinstance(part, np.ndarray) else part for part in old]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_generators(state: Any) -> None:
    setters: dict[str, Callable[[Any], Any]] = {
        "torch": torch.set_rng_state,
        "python": random.setstate,
        "numpy": lambda kept: np.random.set_state(
            (kept[0], np.array(kept[1], np.uint32), *kept[2:])
        ),
    }
    if torch.cuda.is_available():
        setters["cuda"] = torch.cuda.set_rng_state
    for name in state if isinstance(state, dict) else ():
        try:
            if name in setters:
                setters[name](state[name])
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise CheckpointError(f"the saved state of {name}'s generator: {error}") from None
