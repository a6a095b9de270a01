"""Every method on the digits and on the text of ``examples/``: one line a run, one table of all.

    mpirun -np 4 python -m benchmarks.methods_table digits --file runs.jsonl [--only crossover …]
    mpirun -np 4 python -m benchmarks.methods_table text --file runs.jsonl
    python -m benchmarks.methods_table table --file runs.jsonl

Nodes of one rank. Runs that the file holds already are left out, so that a long table can be made
in parts. Quality is what the model makes of data held out: accuracy, or bits per byte. Distance is
the consensus distance, in parts of the weights' norm, at the end of an epoch; the mean over epochs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, f"{Path(__file__).resolve().parent.parent / 'examples'}")

import torch_digits
import torch_text

import gossip_hvd.torch as hvd
from gossip_hvd import session

SEEDS = (0, 1, 2)

RUNS: Mapping[str, Mapping[str, Any]] = {
    "allreduce": {"method": "allreduce"},
    "crossover": {"method": "crossover"},
    "crossover, AWC": {"method": "crossover", "timing": "awc"},
    "crossover, uniform": {"method": "crossover", "peers": "uniform"},
    "crossover, shift": {"method": "crossover", "peers": "shift"},
    "crossover, unfair": {"method": "crossover", "peers": "unfair"},
    "crossover, stream=2": {"method": "crossover", "stream": 2},
    "gossip, one-peer exponential": {"method": "gossip"},
    "gossip, ring": {"method": "gossip", "topology": "ring"},
    "gossip, two peers": {"method": "gossip", "peers": 2},
    "gossip, base graph": {"method": "gossip", "topology": "base_graph"},
    "ceca": {"method": "ceca"},
    "gossip_pga, H=6": {"method": "gossip_pga", "base": "crossover", "period": 6},
    "gossip_aga": {"method": "gossip_aga", "base": "crossover", "initial": 4, "warm_up": 40},
    "gossipgrad": {"method": "gossipgrad"},
    "gossipgrad, AWC": {"method": "gossipgrad", "timing": "awc"},
    "gossipgrad, gradients": {"method": "gossipgrad", "payload": "gradients"},
    "sgp": {"method": "sgp"},
    "sgp, random push": {"method": "sgp", "topology": "random_push"},
    "sgp, overlap": {"method": "sgp", "timing": "awc", "staleness": 1},
    "local_sgd, H=16": {"method": "local_sgd", "period": 16},
    "post_local_sgd, H=16": {"method": "post_local_sgd", "switch": 60, "period": 16},
    "slowmo, H=16": {"method": "slowmo", "period": 16, "beta": 0.5},
    "averaged_momentum": {"method": "averaged_momentum", "base": "crossover"},
    "quasi_global": {"method": "quasi_global", "base": "crossover"},
    "decentlam": {"method": "decentlam"},
    "dsgd_ac": {"method": "dsgd_ac", "base": "crossover", "first": 60},
    "schedule, all-reduce first": {
        "method": "schedule",
        "phases": {0: "allreduce", 60: "crossover"},
    },
    "none": {"method": "none"},
}


DIGITS_ONLY = {
    "crossover, stream=2",
    "gossip, ring",
    "gossip, two peers",
    "gossip, base graph",
    "gossipgrad, AWC",
    "gossipgrad, gradients",
    "sgp, random push",
    "sgp, overlap",
    "decentlam",  # knows SGD only; the text is learned by AdamW
}
"""Variants, of which the shorter task shows enough."""


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        data: training and test data.
        model: makes it.
        optimizer: from parameters.
        rate: largest learning rate.
        epochs: passes over the training data.
        batch: samples a rank and step.
        loss: of a model and a batch.
        quality: of a model on the test data.
        clip: largest norm of a node's gradient.
    """

    data: Callable[[], tuple[TensorDataset, TensorDataset]]
    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    rate: float
    epochs: int
    batch: int
    loss: Callable[[nn.Module, list[Tensor]], Tensor]
    quality: Callable[[nn.Module, TensorDataset], float]
    clip: float


def _digits_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def _text_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return torch_text.bits_per_byte(model, batch[0]) * math.log(2)


TASKS = {
    "digits": Task(
        torch_digits.data,
        torch_digits.Net,
        lambda p: torch.optim.SGD(p, torch_digits.RATE, momentum=0.9, weight_decay=5e-4),
        torch_digits.RATE,
        6,
        torch_digits.BATCH,
        _digits_loss,
        torch_digits.accuracy,
        1.0,
    ),
    "text": Task(
        lambda: torch_text.data(96),
        torch_text.Transformer,
        lambda p: torch.optim.AdamW(p, torch_text.RATE),
        torch_text.RATE,
        5,
        torch_text.BATCH,
        _text_loss,
        torch_text.test,
        1.0,
    ),
}


def train(task: Task, seed: int, options: Mapping[str, Any]) -> dict[str, float]:
    """Train once, by the loop of the examples; returns what came of it."""
    torch.manual_seed(seed)
    train_set, test_set = task.data()
    sampler = DistributedSampler(train_set, hvd.size(), hvd.rank(), seed=seed)
    loader = DataLoader(train_set, task.batch, sampler=sampler, drop_last=True)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.rate, task.epochs * len(loader), cycle_momentum=False, final_div_factor=1
    )
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), seed=seed, **options)
    gossip = optimizer.gossip
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.barrier()
    started, apart, sent = time.monotonic(), [], 0
    for epoch in range(task.epochs):
        before = gossip.bytes_sent  # measuring the distance sends, too
        sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            gossip.report_loss(loss)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
            optimizer.step()
            schedule.step()
        gossip.drain()
        sent += gossip.bytes_sent - before
        apart.append(gossip.consensus_distance() / norm(model))
    seconds = time.monotonic() - started
    replicas = _mean(task.quality(model, test_set))
    hvd.average_parameters(model)
    hvd.recalibrate_batch_norm(model, loader)
    return {
        "merged": task.quality(model, test_set),
        "replicas": replicas,
        "megabytes": _mean(sent) * hvd.size() / hvd.nodes() / 1e6,
        "distance": statistics.mean(apart),
        "steps": task.epochs * len(loader),
        "seconds": seconds,
    }


def norm(model: nn.Module) -> float:
    """‖x‖ of this rank's weights."""
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))


def _mean(value: float) -> float:
    return float(session.current().world.sum([value], "a mean")[0] / hvd.size())


def known(file: Path) -> Iterator[dict[str, Any]]:
    """The runs that a file holds."""
    lines = file.read_text().splitlines() if file.exists() else []
    return map(json.loads, lines)


def run(
    name: str, file: Path, only: Iterable[str], limit: float, clip: float | None = None
) -> None:
    """Make the missing runs of one task, one after the other, for about ``limit`` seconds."""
    task = TASKS[name] if clip is None else replace(TASKS[name], clip=clip)
    torch.set_num_threads(1)
    hvd.init(node_size=1)
    until = time.monotonic() + limit
    done = {(one["task"], one["run"], one["seed"]) for one in known(file)}
    hvd.barrier()  # all have read before one writes
    for label, options in RUNS.items():
        if (only and label not in only) or (name == "text" and label in DIGITS_ONLY):
            continue
        for seed in SEEDS:
            late = _mean(float(time.monotonic() > until)) > 0
            if (name, label, seed) in done or late:
                continue
            result = {"task": name, "run": label, "seed": seed, **train(task, seed, options)}
            if hvd.rank() == 0:
                with file.open("a") as log:
                    log.write(json.dumps(result) + "\n")
                print(f"{name:6} {label:30} {seed} {result['merged']:.4f}", flush=True)
    hvd.shutdown()


def table(file: Path) -> str:
    """Mean ± standard deviation over seeds, in Markdown; both tasks side by side."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in known(file):
        runs.setdefault((one["run"], one["task"]), []).append(one)
    head = ["merged", "mean of nodes", "MB a node", "distance, %"]
    lines = [
        "| | digits: " + " | ".join(head) + " | text: " + " | ".join(head) + " |",
        "|---|" + "--:|" * 8,
    ]
    for label in RUNS:
        cells = [c for task in TASKS for c in _cells(task, runs.get((label, task), []))]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(task: str, runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return ["–"] * 4
    scale, digits = (100.0, 1) if task == "digits" else (1.0, 3)

    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f} ±{statistics.pstdev(values):.{digits}f}"

    return [
        spread([scale * r["merged"] for r in runs], digits),
        spread([scale * r["replicas"] for r in runs], digits),
        f"{statistics.mean(r['megabytes'] for r in runs):.0f}",
        f"{100 * statistics.mean(r['distance'] for r in runs):.2g}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=[*TASKS, "table"])
    parser.add_argument("--file", type=Path, required=True, help="one line of JSON a run")
    parser.add_argument("--only", nargs="+", default=[], help="names of runs")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds to go on for (300)")
    parser.add_argument("--clip", type=float, help="largest norm of a gradient, not the task's")
    args = parser.parse_args()
    if args.what == "table":
        print(table(args.file))
    else:
        run(args.what, args.file, args.only, args.limit, args.clip)


if __name__ == "__main__":
    main()
