"""Start one contender on the testbed's hosts and bring its ranks' times home."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.race.contenders import Contender
from benchmarks.testbed import Testbed

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "build" / "peers"


@dataclass(frozen=True)
class Bench:
    """The setting of a race: the reference bench unless told otherwise.

    Attributes:
        hosts: how many.
        ranks: on each host.
        rate: of each host's link.
        nbytes: of the model, in float32.
        compute: seconds a step, asleep.
        steps: timed.
        late: chance and seconds by which each host is late in a step.
    """

    hosts: int = 4
    ranks: int = 2
    rate: str | None = "200mbit"
    nbytes: int = 34_000_000
    compute: float = 1.0
    steps: int = 40
    late: tuple[float, float] = (0.0, 0.0)


class ContenderError(RuntimeError):
    """A contender did not come to the end; the text is the last it said."""


@dataclass(frozen=True)
class Result:
    """One run of one contender.

    Attributes:
        name: the contender's.
        wall: seconds a step, of the slowest rank, drain included.
        worst: the longest step of any rank.
        cpu: processor seconds a step, of all ranks together.
        load: load average of the machine before and after.
        overslept: the longest time by which a sleeping thread was woken too late on any host.
        steps: of the slowest rank.
        about: versions.
        ranks: all that each rank wrote.
    """

    name: str
    wall: float
    worst: float
    cpu: float
    load: tuple[float, float]
    overslept: float
    steps: list[float]
    about: dict[str, str]
    ranks: list[dict[str, Any]]

    @classmethod
    def of(cls, name: str, ranks: list[dict[str, Any]], load: tuple[float, float]) -> Result:
        """From what the ranks wrote."""
        slowest = max(ranks, key=lambda r: r["wall"])
        return cls(
            name,
            slowest["wall"],
            max(max(r["steps"]) for r in ranks),
            sum(r["cpu"] for r in ranks),
            load,
            max(r["overslept"] for r in ranks),
            slowest["steps"],
            slowest["about"],
            ranks,
        )


def install(requirement: str) -> Path:
    """A peer's package in a folder of its own, so that the project's environment stays as it is."""
    folder = PEERS / requirement.replace("==", "-")
    if not folder.exists():
        PEERS.mkdir(parents=True, exist_ok=True)
        fresh = tempfile.mkdtemp(dir=PEERS)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", fresh, requirement, "loguru>=0.7.3"], capture_output=True, text=True
        )
        if done.returncode:
            shutil.rmtree(fresh)
            raise ContenderError(f"{requirement} cannot be installed:\n{done.stderr[-2000:]}")
        Path(fresh).rename(folder)
    return folder


def launch(
    bed: Testbed,
    bench: Bench,
    contender: Contender,
    extra: tuple[str, ...] = (),
    timeout: float = 600.0,
) -> list[dict[str, Any]]:
    """Run a contender's program on every host; returns what each rank wrote.

    Raises:
        ContenderError: where it fails or takes longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="race-") as out:
        command = [
            *("mpirun", "-np", str(bench.hosts * bench.ranks), "-H", bed.slots(bench.ranks)),
            *("--map-by", "slot", "--bind-to", "none", "-wdir", str(ROOT)),
            *(word for name in _surroundings(contender, bed) for word in ("-x", name)),
            *(sys.executable, "-m", f"benchmarks.race.programs.{contender.program}"),
            *("--out", out, "--steps", str(bench.steps), "--bytes", str(bench.nbytes)),
            *("--compute", str(bench.compute), "--ranks-per-host", str(bench.ranks)),
            *("--late-chance", str(bench.late[0]), "--late-seconds", str(bench.late[1])),
            *contender.arguments,
            *extra,
        ]
        try:
            done = bed.run(
                command,
                env=_surroundings(contender, bed),
                timeout=timeout,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except subprocess.TimeoutExpired:
            raise ContenderError(f"{contender.name}: no end within {timeout:.0f} s.") from None
        found = sorted(Path(out).glob("*.json"), key=lambda path: int(path.stem))
        if done.returncode or len(found) != bench.hosts * bench.ranks:
            raise ContenderError(f"{contender.name}: exit {done.returncode}\n{done.stdout[-3000:]}")
        return [json.loads(path.read_text()) for path in found]


def timed(bed: Testbed, bench: Bench, contender: Contender, extra: tuple[str, ...] = ()) -> Result:
    """Run a contender once and time it."""
    before = os.getloadavg()[0]
    limit = 120.0 + (bench.steps + 3) * (bench.compute + 20.0)
    ranks = launch(bed, bench, contender, extra, limit)
    return Result.of(contender.name, ranks, (before, os.getloadavg()[0]))


def _surroundings(contender: Contender, bed: Testbed) -> dict[str, str]:
    own = Path(sys.executable).parent
    path = [str(own), os.environ.get("PATH", os.defpath)]
    found = {
        "PATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "GLOO_SOCKET_IFNAME": "e0",
        "MASTER_ADDR": bed.address(bed.hosts[0]),
        "MASTER_PORT": "29600",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **contender.env,
    }
    if contender.needs:
        found["PYTHONPATH"] = str(install(contender.needs))
    return found
