"""One phase of a job that is stopped and goes on: ``save``, ``resume`` or ``merge``.

save     every configuration: a run of 2k steps; another of k steps, then a checkpoint
resume   in new processes: restore, k more steps, compare with the 2k steps to the bit
merge    in a job of another shape: restore, compare with the mean of the old nodes
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import gossip_hvd.torch as hvd
from gossip_hvd import session
from gossip_hvd.checkpoint.trees import flatten
from gossip_hvd.methods import METHODS

STEPS = 4
"""k: in the midst of every period below."""

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "allreduce": {},
    "gossip": {"segments": 3},
    "crossover": {"chunk_bytes": 64},
    "ceca": {},
    "gossip_pga": {"base": "crossover", "period": 3},
    "gossip_aga": {"initial": 2, "warm_up": 3, "longest": 4},
    "local_sgd": {"period": 3},
    "post_local_sgd": {"switch": 2, "period": 3},
    "gossipgrad": {},
    "sgp": {"topology": "random_push"},
    "slowmo": {"base": "gossip", "period": 3, "beta": 0.4},
    "averaged_momentum": {"base": "crossover"},
    "quasi_global": {},
    "decentlam": {},
    "dsgd_ac": {"floor": 0.3},
    "schedule": {"phases": {0: "allreduce", 3: "crossover"}},
}
"""Every method, with options that show all of it within a few rounds."""

WIRES = {"sgd": None, "adam": "bfloat16"}
"""By optimizer, what travels: each of both meets both timings and every method."""


@dataclass(frozen=True)
class Case:
    """One configuration."""

    method: str
    timing: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.method}-{self.timing}-{self.optimizer}"

    @classmethod
    def of(cls, method: str) -> list[Case]:
        """The configurations that a method allows."""
        one = METHODS[method](**own(method))
        optimizers = ["sgd"] if one.optimizers == ("SGD",) else list(WIRES)
        return [cls(method, *pair) for pair in product(one.timings, optimizers)]


def own(method: str) -> dict[str, Any]:
    """The method's own options."""
    engine = ("segments", "chunk_bytes")
    return {k: v for k, v in OPTIONS[method].items() if k not in engine}


CASES = [case for method in OPTIONS for case in Case.of(method)]
MERGED = ["crossover-awc-sgd", "sgp-awc-adam", "slowmo-atc-sgd"]


class Run:
    """A model in training, with dropout and batch norm, which differ inside a node."""

    def __init__(self, case: Case, folder: Path) -> None:
        torch.manual_seed(3)
        layers = [torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh()]
        layers += [torch.nn.Dropout(0.2), torch.nn.Linear(6, 3)]
        self.model = torch.nn.Sequential(*layers)
        self.optimizer: Any = {
            "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
            "adam": lambda p: torch.optim.Adam(p, 0.01),
        }[case.optimizer](self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        hvd.DistributedOptimizer(
            self.optimizer,
            self.model.named_parameters(),
            method=case.method,
            timing=case.timing,
            wire_dtype=WIRES[case.optimizer],
            **OPTIONS[case.method],
        )
        torch.manual_seed(hvd.rank())
        self.case, self.folder, self.done = case, folder, 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(4, 5)
            self.optimizer.zero_grad()
            loss = (self.model(x) - x[:, :3] - hvd.node()).square().mean()
            self.optimizer.gossip.report_loss(loss)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.done += 1

    def save(self) -> None:
        extra = {"done": self.done, "schedule": self.schedule.state_dict()}
        hvd.save_checkpoint(
            self.folder / str(self.case),
            model={"net": self.model},
            optimizer=self.optimizer,
            extra=extra,
        )

    def restore(self) -> hvd.Restored:
        directory = self.folder / str(self.case)
        found = hvd.restore(directory, model={"net": self.model}, optimizer=self.optimizer)
        assert found is not None
        self.done = found.extra["done"]
        self.schedule.load_state_dict(found.extra["schedule"])
        return found

    def state(self) -> dict[str, Any]:
        """All that training has come to."""
        gossip = self.optimizer.gossip.state_dict()
        gossip["in_flight"] = None if gossip["in_flight"] is None else "yes"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gossip": gossip,
            "random": torch.get_rng_state(),
        }

    def end(self) -> dict[str, Any]:
        """The state, with the exchange in flight landed."""
        assert self.done == 2 * STEPS
        self.optimizer.gossip.close()
        return self.state()


def save(case: Case, folder: Path) -> None:
    whole = Run(case, folder)
    whole.train(2 * STEPS)
    torch.save(whole.end(), folder / f"{case}.{hvd.rank()}.pt")
    part = Run(case, folder)
    part.train(STEPS)
    part.save()
    torch.save(part.state(), folder / f"{case}.{hvd.rank()}.half.pt")
    part.optimizer.gossip.close()


def resume(case: Case, folder: Path) -> None:
    run = Run(case, folder)
    torch.manual_seed(99)
    found = run.restore()
    assert not found.merged
    assert run.done == STEPS
    run.train(STEPS)
    assert_same(run.end(), torch.load(folder / f"{case}.{hvd.rank()}.pt", weights_only=True))


def merge(case: Case, folder: Path) -> None:
    run = Run(case, folder)
    old = sorted(folder.glob(f"{case}.*.half.pt"))
    states = [torch.load(path, weights_only=True) for path in old]
    found = run.restore()
    assert found.merged
    assert run.done == STEPS
    assert run.optimizer.gossip.round == states[0]["gossip"]["round"] == found.rounds[""]
    masses = [state["gossip"]["mass"] for state in states]
    assert sum(masses) == len(states)
    assert (len(set(masses)) > 1) == (case.method == "sgp")
    for name, value in run.model.state_dict().items():
        every = [(m * s["model"][name].double()) for m, s in zip(masses, states, strict=True)]
        expected = torch.stack(every).mean(0)
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    for i, held in run.optimizer.state_dict()["state"].items():
        for name, value in held.items():
            every = [s["optimizer"]["state"][i][name].double() for s in states]
            torch.testing.assert_close(
                value.double(), torch.stack(every).mean(0), rtol=1e-6, atol=1e-9
            )
    texts = session.current().world.allgather(
        str([p.tolist() for p in run.model.state_dict().values()]).encode(), "test"
    )
    assert len(set(texts)) == 1, "all ranks start from the same bits"
    run.train(STEPS)
    run.end()


def assert_same(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    tree, named = flatten(mine, torch.Tensor)
    expected_tree, expected = flatten(theirs, torch.Tensor)
    assert tree == expected_tree
    for a, b in zip(named, expected, strict=True):
        assert a.tensor.dtype == b.tensor.dtype, a.name
        bits = [t.reshape(-1).view(torch.uint8) for t in (a.tensor, b.tensor)]
        assert torch.equal(*bits), a.name


def main(phase: str, folder: Path, node_size: int) -> None:
    torch.set_num_threads(1)
    hvd.init(node_size=node_size)
    cases = [c for c in CASES if phase != "merge" or str(c) in MERGED]
    for case in cases:
        failure = ""
        try:
            {"save": save, "resume": resume, "merge": merge}[phase](case, folder)
        except AssertionError:
            failure = traceback.format_exc()
        with (folder / f"{phase}{hvd.rank()}.jsonl").open("a") as log:
            log.write(json.dumps([str(case), failure]) + "\n")
    if phase == "save":
        session.current().world.barrier("the end")
        os.kill(os.getpid(), signal.SIGKILL)
    hvd.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
