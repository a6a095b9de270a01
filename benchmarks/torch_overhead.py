"""A training step with the wrapped optimizer against Horovod's own, in one job and by turns.

    mpirun -np 2 --bind-to none --oversubscribe python benchmarks/torch_overhead.py

In each scope the same model trains with plain Horovod and with ``method="allreduce"`` of this
library, some steps each in turn, under one running Horovod. The figure is the median over turns of
the ratio of their times within a turn.
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


def trainer(
    wrap: Callable[..., torch.optim.Optimizer], asked: argparse.Namespace, options: dict[str, Any]
) -> Callable[[], float]:
    """Trains a model of its own for some steps; gives seconds a step on this rank.

    The model has ``layers`` linear layers: 4 · layers · width² bytes.
    """
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(asked.layers):
        layers += [torch.nn.Linear(asked.width, asked.width), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = wrap(sgd, named_parameters=model.named_parameters(), **options)
    x = torch.randn(asked.batch, asked.width)

    def train() -> float:
        started = time.perf_counter()
        for _ in range(asked.steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return (time.perf_counter() - started) / asked.steps

    return train


def compare(asked: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds a step, Horovod's and ours, of every turn; both take turns at going first."""
    theirs = trainer(horovod.DistributedOptimizer, asked, {})
    mine = trainer(ours.DistributedOptimizer, asked, {"method": "allreduce"})
    turns = []
    for turn in range(-1, asked.turns):
        found = {}
        for train in (theirs, mine) if turn % 2 else (mine, theirs):
            ours.barrier()
            found[train] = train()
        if turn >= 0:
            turns.append((found[theirs], found[mine]))
    return turns


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="of one turn")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    comm = mpi.start().COMM_WORLD
    rank, whole = comm.Get_rank(), comm.Get_size()
    if rank == 0:
        print(f"{whole} ranks, {asked}: ms a step, Horovod's and ours; ratio, its quartiles")
    # Scope world sees as many nodes as ranks, and Horovod sees all ranks in both.
    for scope, node_size in (("node", whole), ("world", 1)):
        ours.init(horovod_scope=scope, node_size=node_size)
        turns = compare(asked)
        ours.shutdown()
        if rank == 0:
            theirs, mine = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
            low, median, high = statistics.quantiles([b / a for a, b in turns], n=4)
            print(
                f"scope {scope:5} {theirs:8.3f} {mine:8.3f}  {median:.3f} ({low:.3f} to {high:.3f})"
            )


if __name__ == "__main__":
    main()
