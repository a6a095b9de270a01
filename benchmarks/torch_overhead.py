"""A training step with the wrapped optimizer against Horovod's own, in one job and by turns.

    mpirun -np 2 --bind-to none python benchmarks/torch_overhead.py

Each repeat trains the same model with plain Horovod, then with ``method="allreduce"`` of this
library in each scope, on one machine; the figure is the median over repeats of the ratio of median
step times within a repeat.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import horovod.torch as horovod
import torch

import gossip_hvd.torch as ours
from gossip_hvd.transport import mpi


def model(layers: int, width: int) -> torch.nn.Module:
    """``layers`` linear layers; 4 · layers · width² bytes."""
    torch.manual_seed(0)
    made: list[torch.nn.Module] = []
    for _ in range(layers):
        made += [torch.nn.Linear(width, width), torch.nn.ReLU()]
    return torch.nn.Sequential(*made)


def seconds(hvd: Any, asked: argparse.Namespace, options: dict[str, Any]) -> float:
    """The median time of a step on this rank."""
    net = model(asked.layers, asked.width)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=1e-3), net.named_parameters(), **options
    )
    x = torch.randn(asked.batch, asked.width)
    times = []
    for _ in range(asked.steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[asked.steps // 4 :])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    comm = mpi.start().COMM_WORLD
    whole = comm.Get_size()
    starts: dict[str, tuple[Any, Callable[[], None], dict[str, Any]]] = {
        "horovod": (horovod, lambda: horovod.init(comm=comm), {}),
        "scope node": (
            ours,
            lambda: ours.init(horovod_scope="node", node_size=whole),
            {"method": "allreduce"},
        ),
        "scope world": (
            ours,
            lambda: ours.init(horovod_scope="world", node_size=1),
            {"method": "allreduce"},
        ),
    }
    rows: list[dict[str, float]] = []
    for _ in range(asked.repeats):
        row = {}
        for name, (hvd, start, options) in starts.items():
            start()
            row[name] = seconds(hvd, asked, options)
            hvd.barrier()
            hvd.shutdown()
            comm.Barrier()
        rows.append(row)
    if comm.Get_rank():
        return
    print(f"{whole} ranks, {asked}: milliseconds a step (median), ratio to Horovod's")
    for name in starts:
        ratios = sorted(row[name] / row["horovod"] for row in rows)
        print(
            f"{name:>12} {statistics.median(row[name] for row in rows) * 1e3:8.3f}  "
            f"{statistics.median(ratios):.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
