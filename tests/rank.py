"""What one rank of a shared launch does: run the listed checks in order, write how each went."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ranks import ADAPTERS, PATIENCE, Job

from gossip_hvd import session
from gossip_hvd.transport import mpi


class Rank:
    """What a check's body is given.

    Attributes:
        job: how it was started.
        rank: this rank.
        size: of the world.
        nodes: world ranks of every node.
        node: this rank's node.
    """

    def __init__(self, job: Job, comm: Any) -> None:
        self.job, self._comm = job, comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.nodes = job.nodes
        self.node = next(i for i, ranks in enumerate(self.nodes) if self.rank in ranks)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, not by way of what is being tested."""
        return list(self._comm.allgather(value))

    def settle(self) -> None:
        """Wait for all."""
        self._comm.Barrier()


def main(folder: Path) -> None:
    todo = json.loads((folder / "todo.json").read_text())
    # Before MPI: TensorFlow brings a hwloc of its own, and one process can have one only.
    importlib.import_module(ADAPTERS[Job(**todo[0]["job"]).adapter][0])
    MPI = mpi.start()
    comm = MPI.COMM_WORLD.Dup()
    with (folder / f"rank{comm.Get_rank()}.jsonl").open("a") as log:
        for entry in todo:
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            failure = run(entry, comm)
            log.write(json.dumps({"id": entry["id"], "failure": failure}) + "\n")
            log.flush()
            failures = how_many(comm, failure)
            if failures == comm.Get_size():
                session.shutdown()  # All ranks failed alike, so the job may go on.
            elif failures:
                os._exit(1)
            faulthandler.cancel_dump_traceback_later()


def run(entry: dict[str, Any], comm: Any) -> str:
    """One check; returns what went wrong."""
    job = Job(**entry["job"])
    test = getattr(module(entry["file"]), entry["check"])
    random.seed(0)
    np.random.seed(0)
    start_afresh(job.adapter)
    try:
        if not test.bare:
            importlib.import_module(ADAPTERS[job.adapter][0]).init(
                horovod_scope=job.scope, node_size=job.node_size
            )
        test.body(Rank(job, comm))
        session.shutdown()
    except BaseException:
        return traceback.format_exc()
    finally:
        gc.collect()
    return ""


def start_afresh(adapter: str) -> None:
    """The framework as if nothing had run before; only that of the adapter is loaded."""
    if adapter == "torch":
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        return
    import keras

    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


def how_many(comm: Any, failure: str) -> int:
    """On how many ranks a check failed; a rank that does not say in time counts too."""
    from mpi4py import MPI

    mine, total = np.array([bool(failure)], np.int32), np.empty(1, np.int32)
    request = comm.Iallreduce(mine, total, MPI.SUM)
    until = time.monotonic() + (5.0 if failure else 2 * PATIENCE)
    while not request.Test():
        if time.monotonic() > until:
            return 1
        time.sleep(1e-4)
    return int(total[0])


_modules: dict[str, ModuleType] = {}


def module(file: str) -> ModuleType:
    """A test file, read once."""
    if file not in _modules:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = made
        sys.path.insert(0, str(Path(file).parent))
        spec.loader.exec_module(made)
        _modules[file] = made
    return _modules[file]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
