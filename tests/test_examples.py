"""The examples run on one process and on two, say what came of it, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SECONDS = 120.0
SCRIPTS = Path(sysconfig.get_path("scripts"))
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMP_NUM_THREADS": "1",
}
COSTS = {"seed", "seconds", "rounds", "bytes_per_rank", "bytes_per_node", "consensus_distance"}


def run(ranks: int, example: str, *options: str) -> str:
    """What an example prints, on so many ranks; started and ended in a process group of its own."""
    environment = {**os.environ, **ENVIRONMENT}
    environment["PATH"] = f"{SCRIPTS}{os.pathsep}{environment.get('PATH', '')}"
    launcher = ["mpirun", "-np", f"{ranks}", "--bind-to", "none"] if ranks > 1 else []
    process = subprocess.Popen(
        [*launcher, sys.executable, "-W", "error", f"{EXAMPLES / example}", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    late = False
    with process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if late:
            output, _ = process.communicate()
    assert not late, f"not done after {SECONDS:.0f} s: {output}"
    assert process.returncode == 0, output
    assert left_behind(process.pid) == [], output
    return output


def left_behind(session: int) -> list[str]:
    """Command lines of processes that still run in a session."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            # pid (name) state ppid pgrp session …; the name may hold anything
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (OSError, IndexError):
            continue
    return found


@pytest.mark.parametrize(
    ("example", "measure", "further"),
    [
        ("torch_digits.py", "accuracy", ()),
        ("torch_text.py", "bits_per_byte", ("--kilobytes", "24")),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_and_reports(
    example: str, measure: str, further: tuple[str, ...], ranks: int, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    options = ["--node-size", "1", "--epochs", "1", "--seed", "3", "4", "--json", f"{file}"]
    output = run(ranks, example, *options, *further)

    result = json.loads(file.read_text())
    assert result["method"] == "crossover"
    assert (result["ranks"], result["nodes"]) == (ranks, ranks)
    merged, replicas = f"merged_{measure}", f"replicas_{measure}"
    for seed, line in zip((3, 4), result["runs"], strict=True):
        assert set(line) == COSTS | {merged, replicas}
        assert line["seed"] == seed
        assert line["seconds"] > 0
        assert (line["rounds"] > 0) == (line["bytes_per_rank"] > 0) == (ranks > 1)
        # Between two nodes ½ + ½ is the exact mean.
        assert line["consensus_distance"] == 0
        assert f"seed {seed}, epoch  1 of 1" in output
    assert len({line[merged] for line in result["runs"]}) == 2
    assert f"method crossover, timing atc, ranks {ranks}, nodes {ranks}, epochs 1" in output
    assert output.count("nobody to gossip with") == (ranks == 1)


def test_digits_learns_under_overlap_in_world_scope(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    options = ["--scope", "world", "--node-size", "1", "--epochs", "4", "--json", f"{file}"]
    run(2, "torch_digits.py", *options, "--method", "crossover", "--timing", "awc")

    (line,) = json.loads(file.read_text())["runs"]
    assert line["merged_accuracy"] > 0.9
    assert line["replicas_accuracy"] > 0.9
    assert line["consensus_distance"] > 0
