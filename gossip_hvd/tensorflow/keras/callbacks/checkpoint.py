"""``GossipCheckpoint``: all that a job needs to go on as if it had never stopped.

A checkpoint is a folder ``epoch-00007``: one ``rank*.npz`` a rank with the values of all variables
of model and optimizer (also those that differ inside a node, such as batch norm's statistics and
the state of dropout's random numbers) and its ``gossip.state_dict()``, and ``job.json`` with the
epoch. It is complete once it has its name: it is written under another and renamed at the end.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from gossip_hvd import session
from gossip_hvd.agreement import require_agreement
from gossip_hvd.errors import CheckpointError, ConfigError
from gossip_hvd.tensorflow.keras.callbacks.contract import Callback, built, gossip_of

VERSION = 2

ARRAYS = ("arrays", "replicas")
"""The entries of a gossip's state that hold arrays."""


class GossipCheckpoint(Callback):
    """Save every few epochs, and go on from the last checkpoint when training begins.

    Put it last. The folder must be one that all ranks see. Going on is exact, to the bit, where
    the training itself is deterministic and the script's own data order is that of the epoch.

    Args:
        directory: of the checkpoints.
        every: epochs between checkpoints.
        keep: how many of the newest to keep.
        resume: whether to go on from the newest; ``fit`` then begins with the epoch after it.
    """

    def __init__(
        self, directory: str | Path, every: int = 1, keep: int = 2, resume: bool = True
    ) -> None:
        super().__init__()
        if every < 1 or keep < 1:
            raise ConfigError(f"every={every}, keep={keep}: expected 1 or more of both.")
        self.directory, self.every, self.keep, self.resume = Path(directory), every, keep, resume

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Go on from the newest checkpoint, if there is one."""
        if self.resume and (found := self._checkpoints()):
            self.restore(found[-1])

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Save, if it is this epoch's turn."""
        if (epoch + 1) % self.every == 0:
            self.save(epoch)

    def save(self, epoch: int) -> Path:
        """Write a checkpoint of the end of ``epoch``; all ranks must call."""
        world = session.current().world
        gossip = gossip_of(self.model)
        going = gossip is not None and gossip.begun
        state = gossip.state_dict(drain=True) if going else None
        final = self.directory / f"epoch-{epoch:05d}"
        draft = self.directory / f"{final.name}.draft"
        draft.mkdir(parents=True, exist_ok=True)
        held = {str(i): _raw(v) for i, v in enumerate(self._variables())}
        with (draft / f"rank{world.rank}.npz").open("wb") as file:
            np.savez(file, **held, **_packed(state))
        world.barrier("GossipCheckpoint")
        if world.rank == 0:
            (draft / "job.json").write_text(json.dumps(self._job(epoch, state), indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
            for old in self._checkpoints()[: -self.keep]:
                shutil.rmtree(old)
        world.barrier("GossipCheckpoint")
        return final

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint; all ranks must call, with model and optimizer built.

        Raises:
            ConfigError: for a checkpoint of another job, or of another version.
        """
        world = session.current().world
        job = json.loads((folder / "job.json").read_text())
        require_agreement(world, "GossipCheckpoint", {"the checkpoint": folder.name})
        nodes = [list(ranks) for ranks in session.current().cluster.nodes]
        if job["version"] != VERSION or job["nodes"] != nodes:
            raise ConfigError(
                f"{folder}: a checkpoint of version {job['version']} of nodes {job['nodes']}; "
                f"this is version {VERSION} with nodes {nodes}. Start as many ranks in the same "
                "nodes, or load the model from a .keras file instead."
            )
        if not built(self.model):
            raise ConfigError(
                f"{folder}: the model has no variables yet to restore: call model.build(shape) "
                "before fit."
            )
        with np.load(folder / f"rank{world.rank}.npz") as held:
            variables = self._variables()
            numbered = [name for name in held.files if name.isdigit()]
            if len(numbered) != len(variables):
                raise ConfigError(
                    f"{folder}: it holds {len(numbered)} variables, model and optimizer have "
                    f"{len(variables)}. Build the same model with the same optimizer."
                )
            for i, variable in enumerate(variables):
                variable.assign(held[str(i)].view(np.asarray(variable.numpy()).dtype))
            state = _unpacked(held)
        gossip = gossip_of(self.model)
        if gossip is not None and state is not None:
            self.model.optimizer.begin()
            gossip.load_state_dict(state)
        # Where Keras's own BackupAndRestore tells fit in which epoch to begin.
        self.model._initial_epoch = job["epoch"] + 1

    def _job(self, epoch: int, state: Any) -> dict[str, Any]:
        nodes = session.current().cluster.nodes
        numbers = None if state is None else {"round": state["round"]}
        return {"version": VERSION, "epoch": epoch, "nodes": nodes, "gossip": numbers}

    def _variables(self) -> list[Any]:
        """Every variable of model and optimizer once, in a fixed order."""
        every = [*self.model.variables, *self.model.optimizer.variables]
        return list({id(v): v for v in every}.values())

    def _checkpoints(self) -> list[Path]:
        """The complete ones, oldest first."""
        return sorted(p.parent for p in self.directory.glob("epoch-[0-9]*[0-9]/job.json"))


def _packed(state: Any) -> dict[str, Any]:
    """A gossip's state as arrays, by names that no variable has: its numbers are JSON's text."""
    if state is None:
        return {}
    arrays = {f"{kind}:{name}": a for kind in ARRAYS for name, a in state[kind].items()}
    text = json.dumps({**state, **{kind: {} for kind in ARRAYS}})
    return {"gossip": np.frombuffer(text.encode(), np.uint8), **arrays}


def _unpacked(held: Any) -> dict[str, Any] | None:
    """What ``_packed`` has packed."""
    if "gossip" not in held:
        return None
    try:
        state: dict[str, Any] = json.loads(held["gossip"].tobytes())
    except ValueError as error:
        raise CheckpointError(f"the saved gossip is no JSON: {error}") from None
    for kind in ARRAYS:
        names = [name for name in held.files if name.startswith(f"{kind}:")]
        state[kind] = {name.removeprefix(f"{kind}:"): held[name] for name in names}
    return state


def _raw(variable: Any) -> Any:
    """A variable's values in a dtype that NumPy can write."""
    values = np.asarray(variable.numpy())
    return values.view(np.uint16) if values.dtype.name == "bfloat16" else values
