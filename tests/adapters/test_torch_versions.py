"""Ranks with different packages are told so at ``init``: package, both versions, both ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from launch import Outcome, launch

PROGRAM = """
import os
import {adapter} as hvd
import {package}
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    {package}.__version__ = "0.1"
else:
    print("mine is", {package}.__version__)
{start}
print("started")
"""

PACKAGES = ("horovod", "mpi4py", "numpy", "torch", *(["keras"] if find_spec("keras") else []))


@pytest.fixture(scope="module")
def seen() -> dict[str, Outcome]:
    """All launches, three at a time."""

    def run(package: str) -> Outcome:
        adapter = "gossip_hvd.keras" if package == "keras" else "gossip_hvd.torch"
        start = "hvd.init(node_size=1)"
        if package == "keras":  # After PyTorch's adapter has started the job.
            start = f"import gossip_hvd.torch as below\nbelow.init(node_size=1)\n{start}"
        program = PROGRAM.format(adapter=adapter, package=package, start=start)
        return launch(program, 2, limit=100, environ={"KERAS_BACKEND": "torch"})

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(PACKAGES, pool.map(run, PACKAGES), strict=True))


@pytest.mark.parametrize("package", PACKAGES)
def test_another_version_is_named(package: str, seen: dict[str, Outcome]) -> None:
    outcome = seen[package]
    assert outcome.code == 1, outcome.text
    (mine,) = (line.split()[-1] for line in outcome.out.splitlines() if "mine is" in line)
    assert (
        f"ConfigError: init: rank 1 and rank 0 differ in the version of {package}: rank 1 has 0.1, "
        f"rank 0 has {mine}. Give every rank the same settings and packages."
    ) in outcome.err
    assert "started" not in outcome.out
    assert outcome.left == ()
