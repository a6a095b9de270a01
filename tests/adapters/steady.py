"""Ten thousand steps on real ranks, and fifty starts: nothing grows, nothing is left open.

    python tests/adapters/steady.py [--steps 10000] [--starts 50]

Looks at resident memory, open files, threads, requests under way and communicators, after a tenth
of the steps (or starts) and at the end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import Outcome, launch

PROGRAM = """
import gc, os, sys, threading
import torch
import gossip_hvd.torch as hvd
from gossip_hvd.transport import mpi

steps, starts = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
MPI = mpi.start()

def held():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    # MPI gives a new communicator the lowest number that is free.
    probe = MPI.COMM_WORLD.Dup()
    number = probe.py2f()
    probe.Free()
    return {
        "communicators": number,
        "memory": pages * 4096,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "all threads": len(os.listdir("/proc/self/task")),
    }

def job(steps, timing, check=None):
    hvd.init(node_size=2)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.001),
                                         model.named_parameters(), timing=timing)
    early = None
    for step in range(steps):
        if step == steps // 10:
            early = held()
        optimizer.zero_grad()
        model(torch.ones(4, 20)).square().mean().backward()
        optimizer.step()
    optimizer.gossip.drain()
    wire = optimizer.gossip._wire
    assert not wire._due, "receives under way"
    late = held()
    hvd.shutdown()
    return early, late

def compare(what, early, late):
    for key, before in early.items():
        allowed = 8 << 20 if key == "memory" else 0
        grown = late[key] - before
        assert grown <= allowed, f"{what}: {key} grew by {grown}, from {before}"
    rank = os.environ["OMPI_COMM_WORLD_RANK"]
    print(f"rank {rank}: {what}: {early} -> {late}", flush=True)

for timing in ("atc", "awc"):
    compare(f"{steps} steps, {timing}", *job(steps, timing))

early = None
for start in range(starts):
    if start == max(2, starts // 10):
        early = held()
    job(3, "awc" if start % 2 else "atc")
compare(f"{starts} starts", early, held())
print("steady", flush=True)
"""


def steady(steps: int, starts: int) -> Outcome:
    """Four ranks, two nodes."""
    limit = 60 + steps / 20 + 3 * starts
    return launch(PROGRAM, 4, str(steps), str(starts), limit=limit)


def main() -> int:
    """Run it; prints what was held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--starts", type=int, default=50)
    asked = parser.parse_args()
    outcome = steady(asked.steps, asked.starts)
    print(outcome.out, outcome.err, f"{outcome.seconds:.0f} s, exit code {outcome.code}")
    return 0 if outcome.code == 0 and outcome.out.count("steady") == 4 else 1


if __name__ == "__main__":
    sys.exit(main())
