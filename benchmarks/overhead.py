"""What gossip costs a step that is bound by computation: links are fast, all is on one machine.

    python -m benchmarks.overhead [--ranks 2] [--node-size 1] [--batch 2048] [--turns 15]

The same model trains with a plain optimizer whose gradients Horovod averages over the node, and
with each variant of ours. Variants take turns, some steps each, so that whatever else the machine
does hits all alike. A figure is the median over turns of the mean step; what a variant costs is the
median of its turns' ratios to the plain optimizer's in the same turn, with their quartiles. Beside
it stands the processors' own time, all ranks and their threads together, which does not hold the
time in which ranks that exchange wait for each other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType

import torch

WIDTH, DEPTH = 512, 4
VARIANTS = {
    "ours, all-reduce of the node only": {"method": "none"},
    "ours, crossover ATC": {"method": "crossover", "timing": "atc"},
    "ours, crossover AWC": {"method": "crossover", "timing": "awc"},
    "ours, crossover AWC bfloat16": {
        "method": "crossover",
        "timing": "awc",
        "wire_dtype": "bfloat16",
    },
}


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--node-size", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2048, help="samples a step: more compute")
    parser.add_argument("--steps", type=int, default=10, help="of one turn")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--chunk-bytes", type=int, default=0, help="0 for the library's default")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        measure(asked.batch, asked.steps, asked.turns, asked.chunk_bytes or None)
        return
    command = ["mpirun", "-np", f"{asked.ranks}", "--bind-to", "none", "--oversubscribe"]
    command += [sys.executable, "-m", "benchmarks.overhead", "--inside"]
    for name in ("batch", "steps", "turns", "chunk_bytes"):
        command += [f"--{name.replace('_', '-')}", f"{getattr(asked, name)}"]
    environ = {**os.environ, "GOSSIP_HVD_NODE_SIZE": f"{asked.node_size}", "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run(command, env=environ, check=False).returncode)


def measure(batch: int, steps: int, turns: int, chunk_bytes: int | None) -> None:
    """On every rank: run all variants in turn; rank 0 prints."""
    import horovod.torch as plain

    import gossip_hvd.torch as hvd

    torch.set_num_threads(1)
    hvd.init()
    run = {"plain optimizer, Horovod in the node": trainer(plain.DistributedOptimizer, batch, {})}
    for title, options in VARIANTS.items():
        chosen = {**options, "chunk_bytes": chunk_bytes}
        run[title] = trainer(hvd.DistributedOptimizer, batch, chosen)
    times: dict[str, list[float]] = {title: [] for title in run}
    used: dict[str, list[float]] = {title: [] for title in run}
    for turn in range(-1, turns):
        for title, train in run.items():
            hvd.barrier()
            begin, began = time.monotonic(), time.process_time()
            train(steps)
            busy = time.process_time() - began
            hvd.barrier()
            if turn >= 0:
                times[title].append((time.monotonic() - begin) / steps)
                used[title].append(busy / steps)
    used = dict(zip(run, totals(hvd, list(used.values())), strict=True))
    if hvd.rank() == 0:
        show(times, used)
    hvd.shutdown()


def totals(hvd: ModuleType, found: list[list[float]]) -> list[list[float]]:
    """Seconds of every rank, added up."""
    total = hvd.allreduce(torch.tensor(found, dtype=torch.float64), op=hvd.Sum)
    return list(total.tolist())


def trainer(
    wrap: Callable[..., torch.optim.Optimizer], batch: int, options: dict[str, str]
) -> Callable[[int], None]:
    """Trains a model of its own for some steps, what is in flight included."""
    torch.manual_seed(0)
    layers = [
        layer for _ in range(DEPTH) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())
    ]
    model = torch.nn.Sequential(*layers)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    optimizer = wrap(sgd, named_parameters=model.named_parameters(), **options)
    x = torch.randn(batch, WIDTH)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        if gossip := getattr(optimizer, "gossip", None):
            gossip.drain()

    return train


def show(times: dict[str, list[float]], used: dict[str, list[float]]) -> None:
    """One line a variant."""
    print(f"{'':40} {'ms a step':>20} {'more than plain':>26} {'processors':>18}")
    first = next(iter(times))
    for title in times:
        clock = 1e3 * statistics.median(times[title])
        span = f"({1e3 * min(times[title]):.1f}-{1e3 * max(times[title]):.1f})"
        low, middle, high = extra(times[title], times[first])
        more = f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"
        _, work, _ = extra(used[title], used[first])
        busy = f"{1e3 * statistics.median(used[title]):.1f} ms {work:+.1f} %"
        print(f"{title:40} {clock:6.2f} {span:>13} {more:>26} {busy:>18}")


def extra(found: list[float], base: list[float]) -> list[float]:
    """Quartiles of what each turn took beyond the same turn of the plain optimizer, in percent."""
    more = [100 * (one / other - 1) for one, other in zip(found, base, strict=True)]
    return statistics.quantiles(more, n=4, method="inclusive")


if __name__ == "__main__":
    main()
