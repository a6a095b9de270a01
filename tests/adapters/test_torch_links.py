"""Faults of links, on two hosts of the testbed: cut, cut and mended, a hundredth of their rate.

Needs root, network namespaces and iproute2, as the testbed does, and ``GOSSIP_TESTS=links``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault import PRELUDE

from benchmarks.testbed import Testbed, refusal

ROOT = Path(__file__).resolve().parent.parent.parent
REASON = (
    refusal()
    if os.environ.get("GOSSIP_TESTS") == "links"
    else "takes minutes and makes hosts of its own: GOSSIP_TESTS=links asks for it."
)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SETTINGS = {"GOSSIP_HVD_STALL_WARNING": "3", "GOSSIP_HVD_STALL_TIMEOUT": "60"}
KEEPALIVE = {"time": 5, "intvl": 2, "probes": 3}
"""Open MPI's launcher finds out by TCP that a silent host is gone, by default after minutes; ..."""

RETRIES = 5
"""... one that owes it an answer, when the kernel gives up sending: by default after 15 repeats, a
quarter of an hour."""

BIG = 600
"""Side of the model's matrix: 1.4 MB, half a second at a hundredth of 200 Mbit/s and more."""


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(2, "200mbit", name="gflinks", network=77) as made:
        for host in made.hosts:
            command = ["sysctl", "-qw", f"net.ipv4.tcp_retries2={RETRIES}"]
            subprocess.run(["ip", "netns", "exec", host, *command], check=True)
        yield made


@contextmanager
def job(bed: Testbed, steps: int, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """Two ranks, one a host; ends with the test."""
    program = (
        PRELUDE.replace("torch.nn.Linear(3, width)", f"torch.nn.Linear({BIG}, {BIG})").replace(
            "torch.ones(4, 3)", f"torch.ones(1, {BIG})"
        )
        + f"train({steps}, pause=0.05)"
    )
    names = {**SETTINGS, **settings}
    argv = [
        "mpirun",
        *(w for k, v in KEEPALIVE.items() for w in ("--mca", f"oob_tcp_keepalive_{k}", str(v))),
        *("-np", "2", "-H", bed.slots(1), "--bind-to", "none", "-wdir", str(ROOT)),
        *(word for name in names for word in ("-x", name)),
        *(sys.executable, "-u", "-c", program),
    ]
    environ = {**os.environ, **bed.environment(), **names, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        bed.command(argv),
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    try:
        yield started
    finally:
        for host in bed.hosts:
            bed.mend(host)
            bed.rate(host, "200mbit")
            for pid in bed.pids(host):
                os.kill(pid, 9)
        started.wait(30)


def wait_for_traffic(bed: Testbed, host: str, nbytes: int) -> None:
    """Return once a host has sent so much, which is when training is under way."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        command = ["ip", "netns", "exec", host, "cat", "/sys/class/net/e0/statistics/tx_bytes"]
        if int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) > nbytes:
            return
        time.sleep(0.2)
    raise AssertionError("no traffic")


def rank_processes(bed: Testbed, host: str) -> list[int]:
    """Processes of the training program itself, not of its launcher."""
    found = []
    for pid in bed.pids(host):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"python" in line[0] and b"-u" in line:
            found.append(pid)
    return found


def nobody_left(bed: Testbed) -> bool:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if not any(bed.pids(host) for host in bed.hosts):
            return True
        time.sleep(0.2)
    return False


def sent(bed: Testbed, host: str) -> int:
    command = ["ip", "netns", "exec", host, "cat", "/sys/class/net/e0/statistics/tx_bytes"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_cut_link_ends_the_job_on_both_hosts(bed: Testbed) -> None:
    with job(bed, 100_000, GOSSIP_HVD_STALL_TIMEOUT="10") as started:
        wait_for_traffic(bed, bed.hosts[1], sent(bed, bed.hosts[1]) + 8_000_000)
        bed.cut(bed.hosts[1])
        since = time.monotonic()
        while any(rank_processes(bed, host) for host in bed.hosts):
            assert time.monotonic() - since < 60
            time.sleep(0.2)
        print(f"\nranks are gone after {time.monotonic() - since:.1f} s")
        out, _ = started.communicate(timeout=120)
        print(f"the launcher after {time.monotonic() - since:.1f} s, code {started.returncode}")
        assert started.returncode not in (0, None), out
        assert "StallError: no progress" in out
        assert "does not answer: it is stopped, or its host or link is gone" in out
        assert nobody_left(bed)


def test_a_link_that_comes_back_loses_nothing(bed: Testbed) -> None:
    with job(bed, 150) as started:
        wait_for_traffic(bed, bed.hosts[1], sent(bed, bed.hosts[1]) + 8_000_000)
        bed.cut(bed.hosts[1])
        time.sleep(5)
        bed.mend(bed.hosts[1])
        out, _ = started.communicate(timeout=120)
        assert started.returncode == 0, out
        assert len(set(re.findall(r"trained (\S+)", out))) == 1, out
        assert out.count("trained") == 2
        assert nobody_left(bed)


def test_a_link_at_a_hundredth_of_its_rate_is_slow_and_no_more(bed: Testbed) -> None:
    with job(bed, 40) as started:
        wait_for_traffic(bed, bed.hosts[1], sent(bed, bed.hosts[1]) + 8_000_000)
        bed.rate(bed.hosts[1], "2mbit")
        time.sleep(20)
        bed.rate(bed.hosts[1], "200mbit")
        out, _ = started.communicate(timeout=120)
        assert started.returncode == 0, out
        assert out.count("trained") == 2
        assert "StallError" not in out
