"""World-wide operations in scope ``node`` against plain Horovod's, in one job and by turns.

    mpirun -np 8 --bind-to none python benchmarks/world_ops.py
    python -m benchmarks.testbed run -- mpirun -np 8 ... python benchmarks/world_ops.py

Each repeat starts plain Horovod over all ranks, measures, stops it, and does the same with this
library; the figure is the median over repeats of the ratio within a repeat. Horovod looks for new
operations once in a cycle of 1 ms (HOROVOD_CYCLE_TIME), which is most of its small latency.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import horovod.torch as horovod
import torch

import gossip_hvd.torch as ours
from gossip_hvd.transport import mpi

SIZES = {"4 B": 1, "64 KB": 1 << 14, "1 MB": 1 << 18, "4 MB": 1 << 20, "34 MB": 34 * (1 << 18)}


def seconds(hvd: Any, elements: int, patience: float) -> float:
    """The median time of an all-reduce on rank 0, all ranks starting together."""
    values = torch.ones(elements)
    times: list[float] = []
    until = time.perf_counter() + patience
    enough = torch.zeros(1)
    while not enough.item():
        for _ in range(3 if elements > 1 << 20 else 20):
            started = time.perf_counter()
            hvd.allreduce(values, name="measured", op=hvd.Sum)
            times.append(time.perf_counter() - started)
        enough.fill_(float(time.perf_counter() > until))
        enough = hvd.broadcast(enough, 0, name="enough")
    return statistics.median(times[len(times) // 4 :])


def measure(
    hvd: Any, start: Callable[[], None], sizes: list[str], patience: float
) -> dict[str, float]:
    """One turn: start, measure every size, stop."""
    start()
    found = {name: seconds(hvd, SIZES[name], patience) for name in sizes}
    hvd.barrier()
    hvd.shutdown()
    return found


def main() -> None:
    """Measure and print; rank 0 also writes a file where it is asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size and turn")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--node-size", type=int, help="ranks of a virtual node")
    parser.add_argument("--json", help="file for the figures")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    comm = mpi.start().COMM_WORLD
    turns = {
        "horovod": (horovod, lambda: horovod.init(comm=comm)),
        "gossip_hvd": (
            ours,
            lambda: ours.init(horovod_scope="node", node_size=asked.node_size),
        ),
    }
    rows: list[dict[str, dict[str, float]]] = []
    for _ in range(asked.repeats):
        rows.append(
            {who: measure(*turn, asked.sizes, asked.seconds) for who, turn in turns.items()}
        )
        comm.Barrier()
    if comm.Get_rank():
        return
    print(f"{comm.Get_size()} ranks, {asked.repeats} repeats, milliseconds (median) and ratio")
    for name in asked.sizes:
        theirs = statistics.median(row["horovod"][name] for row in rows)
        mine = statistics.median(row["gossip_hvd"][name] for row in rows)
        ratios = sorted(row["gossip_hvd"][name] / row["horovod"][name] for row in rows)
        print(
            f"{name:>6}  Horovod {theirs * 1e3:9.3f}  gossip_hvd {mine * 1e3:9.3f}  ratio "
            f"{statistics.median(ratios):5.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump({"argv": sys.argv, "ranks": comm.Get_size(), "repeats": rows}, file, indent=1)


if __name__ == "__main__":
    main()
