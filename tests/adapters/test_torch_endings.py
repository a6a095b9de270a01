"""How a job ends, in both scopes and under every launcher; ``faults.py`` lists single faults."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, Outcome, launch

TRAIN = """
import os, sys, threading, time
import torch
import gossip_hvd.torch as hvd
def train(steps, at=None, trouble=None, rank=1, method="gossip", **init):
    hvd.init(**init)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), method=method)
    for step in range(steps):
        if step == at and hvd.rank() == rank:
            print("trouble at", time.time(), flush=True)
            trouble()
        optimizer.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        time.sleep(0.005)
def refuse():
    raise LookupError("the data of rank one is gone")
"""

STALL = {"GOSSIP_HVD_STALL_TIMEOUT": "4", "GOSSIP_HVD_SHUTDOWN_TIMEOUT": "8"}
LONG = {"GOSSIP_HVD_STALL_TIMEOUT": "300"}
AT_ONCE = 15.0
"""Seconds within which the trouble of one rank has ended all."""

EVERYWHERE = "node_size=1", "node_size=2", "node_size=2, horovod_scope='world'"


def seconds_after_trouble(outcome: Outcome, ended: float) -> float:
    out = re.sub(r"\[\d+,\d+\]<stdout>:", "", outcome.out)  # a launcher's tags
    moments = re.findall(r"trouble at ([0-9.]+)", out)
    assert moments, outcome.text
    return ended - float(moments[0])


def ends(body: str, ranks: int = 2, **options: object) -> Outcome:
    """Launch, and check that it ended by itself, badly, leaving nothing behind."""
    import time

    outcome = launch(TRAIN + body, ranks, limit=100, **options)  # type: ignore[arg-type]
    after = seconds_after_trouble(outcome, time.time())
    assert outcome.code is not None, f"had to be ended\n{outcome.text}"
    assert outcome.code != 0, outcome.text
    assert outcome.left == ()
    assert after < AT_ONCE + 2 * float(options.get("environ", LONG) is STALL) * 12, after
    return outcome


@pytest.mark.parametrize("init", EVERYWHERE)
def test_one_rank_that_raises_ends_the_job(init: str) -> None:
    outcome = ends(f"train(4000, 20, refuse, {init})", 4, environ=LONG)
    assert "gossip_hvd: rank 1 raised; the job ends." in outcome.err
    assert "LookupError: the data of rank one is gone" in outcome.err
    assert ", in refuse" in outcome.err
    first = outcome.err.index("LookupError")
    assert "Error" not in outcome.err[: outcome.err.index("Traceback")]
    assert first > outcome.err.index("Traceback")


def test_one_rank_that_raises_ends_a_job_of_horovodrun() -> None:
    outcome = ends("train(4000, 20, refuse, node_size=2)", 4, environ=LONG, launcher="horovodrun")
    assert "LookupError: the data of rank one is gone" in outcome.text


def test_one_rank_that_raises_before_training_ends_the_job() -> None:
    body = "hvd.init(node_size=1)\nprint('trouble at', time.time(), flush=True)\n"
    outcome = ends(body + "hvd.rank() == 1 and refuse()\nhvd.barrier()", environ=LONG)
    assert "LookupError" in outcome.err


@pytest.mark.parametrize("scope", ["node", "world"])
def test_a_rank_that_leaves_its_node_alone_is_missed(scope: str) -> None:
    body = f"train(4000, 20, lambda: time.sleep(60), node_size=2, horovod_scope={scope!r})"
    outcome = ends(body, 4, environ=STALL)
    assert "StallError" in outcome.err
    assert "GOSSIP_HVD_STALL_TIMEOUT" in outcome.err


def test_a_loss_that_nobody_of_a_node_reports_is_asked_for() -> None:
    body = """
hvd.init(node_size=2)
model = torch.nn.Linear(3, 2)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), method="gossip_aga")
if hvd.rank() < 2:
    optimizer.gossip.report_loss(1.0)
print('trouble at', time.time(), flush=True)
model(torch.ones(4, 3)).sum().backward()
optimizer.step()
"""
    outcome = ends(body, 4, environ=LONG)
    assert "ConfigError" in outcome.err
    assert "needs the loss: call optimizer.gossip.report_loss(loss) before backward" in outcome.err


def test_a_parameter_unfrozen_on_one_rank_only_is_said() -> None:
    body = """
hvd.init(node_size=2)
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
model[0].weight.requires_grad_(False)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), method='gossip')
for step in range(2):
    if step == 1 and hvd.rank() == 3:
        model[0].weight.requires_grad_(True)
        print('trouble at', time.time(), flush=True)
    optimizer.zero_grad()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
"""
    outcome = ends(body, 4, environ={**STALL, "GOSSIP_HVD_STALL_WARNING": "2"})
    assert "rank 3 (node 1) waits for ranks [2] to average the gradient of" in outcome.err
    assert "'0.weight'" in outcome.err


def test_mpi_without_threads_is_refused() -> None:
    program = """
import mpi4py
mpi4py.rc.thread_level = "serialized"
from mpi4py import MPI
import gossip_hvd.torch as hvd
try:
    hvd.init()
except hvd.ConfigError as error:
    assert "MPI_THREAD_MULTIPLE" in str(error), error
    print("refused")
"""
    outcome = launch(program, 2)
    assert (outcome.code, outcome.out.count("refused"), outcome.left) == (0, 2, ()), outcome.text


def test_a_job_that_forgets_shutdown_ends_well() -> None:
    for launcher, ranks in (("mpirun", 4), ("horovodrun", 2), ("python", 1)):
        outcome = launch(
            TRAIN + "train(20, node_size=1)\nprint(f'end {hvd.rank()}')", ranks, launcher=launcher
        )
        assert outcome.code == 0, outcome.text
        assert all(f"end {rank}" in outcome.out for rank in range(ranks))
        assert outcome.left == ()
        assert "Traceback" not in outcome.text


def modules(program: str) -> set[str]:
    code = f"import sys, json\n{program}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=Path(ROOT),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "tensorflow", "keras", "horovod", "mpi4py", "mpi4py.MPI"}


def test_importing_the_package_does_no_work() -> None:
    assert not modules("import gossip_hvd") & HEAVY


def test_importing_the_adapter_starts_no_mpi_and_no_tensorflow() -> None:
    loaded = modules("import gossip_hvd.torch as hvd\nassert not hvd.is_initialized()")
    assert {"torch", "horovod.torch"} <= loaded
    assert not loaded & {"tensorflow", "keras", "horovod.tensorflow", "mpi4py.MPI"}
