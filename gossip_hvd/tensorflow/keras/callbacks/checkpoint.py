"""``GossipCheckpoint``: all that a job under ``fit`` needs to go on as if it had never stopped.

A rank saves the epoch, the state of its gossip and the values of all variables of model and
optimizer, also of those that differ inside a node, such as batch norm's statistics and the state
of dropout's random numbers. How they are written is in ``gossip_hvd.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossip_hvd import session
from gossip_hvd.checkpoint import job
from gossip_hvd.checkpoint.job import RESTORE, Content, Found, Party, Tensor
from gossip_hvd.checkpoint.merge import Merge
from gossip_hvd.checkpoint.tensors import Kind
from gossip_hvd.checkpoint.trees import flatten
from gossip_hvd.errors import CheckpointError, ConfigError
from gossip_hvd.mixing import Array, dtype_of
from gossip_hvd.tensorflow.keras.callbacks.contract import Callback, built, gossip_of

DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"C{bits}": f"complex{bits}" for bits in (64, 128)},
}
"""NumPy's dtypes by safetensors' names."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


PARTS = {"epoch", "gossip", "variables"}
"""What a rank saves."""


class GossipCheckpoint(Callback):
    """Save every few epochs, and go on from the last whole checkpoint when training begins.

    Put it last. On the nodes of the job that saved, going on is exact, to the bit, where the
    training itself is deterministic and the script's own data order is that of the epoch; other
    nodes start from the mean of the old ones.

    Args:
        directory: of the checkpoints, one for all nodes or one on each.
        every: epochs between checkpoints.
        keep: how many of the newest to keep.
        resume: whether to go on from the newest; ``fit`` then begins with the epoch after it.
        on_terminate: whether to save and leave on SIGTERM, which batch systems send before they
            end a job. Whichever ranks receive it, all stop after the same batch, save together
            and leave with exit code 143. Going on from there begins the interrupted epoch again,
            with the weights of its last step.
    """

    def __init__(
        self,
        directory: str | Path,
        every: int = 1,
        keep: int = 2,
        resume: bool = True,
        *,
        on_terminate: bool = False,
    ) -> None:
        super().__init__()
        if every < 1 or keep < 1:
            raise ConfigError(f"every={every}, keep={keep}: expected 1 or more of both.")
        self.directory, self.every, self.keep, self.resume = Path(directory), every, keep, resume
        self.on_terminate = on_terminate
        self._whole = -1

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Go on from the newest checkpoint, if there is one."""
        if self.resume:
            self.restore()
        if self.on_terminate:
            session.on_terminate(self._leave)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Know which epoch was the last whole one, if this one is interrupted."""
        self._whole = epoch - 1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save and leave, if all ranks were asked to.

        Raises:
            SystemExit: after the last batch.
        """
        if self.on_terminate:
            session.current().terminator.stepped()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Save, if it is this epoch's turn."""
        self._whole = epoch
        if (epoch + 1) % self.every == 0:
            self.save(epoch)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """The end counts as a step: a signal in the last one is still heeded.

        Raises:
            SystemExit: as ``on_train_batch_end``.
        """
        # Keras would begin the next fit with this epoch too.
        self.model._initial_epoch = None
        if self.on_terminate:
            terminator = session.current().terminator
            terminator.stepped()
            terminator.forget(self._leave)

    def _leave(self) -> None:
        self.save(self._whole)

    def save(self, epoch: int) -> Path:
        """Write a checkpoint of the end of ``epoch``; all ranks must call.

        Raises:
            CheckpointError: on every rank, where one cannot write.
        """
        gossip = gossip_of(self.model)
        held = gossip.state_dict() if gossip is not None and gossip.begun else None

        def content() -> Content:
            values = [np.asarray(v.numpy()) for v in self._variables()]
            state = {"epoch": epoch, "gossip": held, "variables": values}
            tree, named = flatten(state, np.ndarray)
            return Content(tree, [n.name for n in named], [_tensor(n.tensor) for n in named])

        current = session.current()
        with current.patient():
            party = Party(current.world, current.cluster)
            return job.save(party, self.directory, content, self.keep)

    def restore(self) -> Path | None:
        """Go on from the newest whole checkpoint; all ranks must call, with everything built.

        Returns:
            The checkpoint; None where there is none.

        Raises:
            CheckpointError: on every rank, where there are checkpoints and none is whole, or
                where the newest whole one does not fit.
        """
        current = session.current()
        party = Party(current.world, current.cluster)
        with current.patient():
            found = job.newest(party, self.directory)
            if found is None:
                return None
            same = found.fits(party.cluster)
            state = party.together(RESTORE, lambda: _state(party, found) if same else _mean(found))
            party.together(RESTORE, lambda: self._load(state["variables"], found))
        gossip = gossip_of(self.model)
        if gossip is not None and state["gossip"] is not None:
            self.model.optimizer.begin()
            if same:
                gossip.load_state_dict(state["gossip"])
            else:
                gossip.begin_at(state["gossip"]["round"])
        # Where Keras's own BackupAndRestore tells fit in which epoch to begin.
        self.model._initial_epoch = state["epoch"] + 1
        return found.path

    def _load(self, values: Sequence[Array], found: Found) -> None:
        if not built(self.model):
            raise CheckpointError(
                f"{found.path}: the model has no variables yet to restore: call "
                "model.build(shape) before fit."
            )
        variables = self._variables()
        here = [(tuple(v.shape), v.dtype) for v in variables]
        if here != [(v.shape, v.dtype.name) for v in values]:
            raise CheckpointError(
                f"{found.path}: it holds {len(values)} variables of other shapes or dtypes than "
                f"the {len(here)} of model and optimizer. Build the same model with the same "
                "optimizer."
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def _variables(self) -> list[Any]:
        """Every variable of model and optimizer once, in a fixed order."""
        every = [*self.model.variables, *self.model.optimizer.variables]
        return list({id(v): v for v in every}.values())


def _state(party: Party, found: Found) -> dict[str, Any]:
    """What this rank has saved."""
    state = job.state_of(found, party.node, party.place, _array)
    if not isinstance(state, dict) or set(state) != PARTS or not isinstance(state["epoch"], int):
        raise _foreign(found)
    return state


def _foreign(found: Found) -> CheckpointError:
    return CheckpointError(f"{found.path} was not written by GossipCheckpoint.")


def _mean(found: Found) -> dict[str, Any]:
    """What nodes that did not save start from."""
    files = Merge(found)
    try:
        gossip = files.plain(["gossip"])
        if not all(one is None or (isinstance(one, dict) and "mass" in one) for one in gossip):
            raise _foreign(found)
        masses = [1.0 if one is None else float(one["mass"]) for one in gossip]
        return {
            "epoch": files.first(["epoch"], _array),
            "gossip": gossip[0],
            "variables": files.mean(["variables"], masses, _array),
        }
    finally:
        files.close()


def _tensor(array: Array) -> Tensor:
    plain = np.require(array, requirements="C")
    return Tensor(Kind(NAMES[array.dtype.name], array.shape), plain.reshape(-1).view(np.uint8))


def _array(tensor: Tensor) -> Array:
    dtype = dtype_of(DTYPES[tensor.kind.dtype])
    return tensor.data.view(dtype).reshape(tensor.kind.shape)
