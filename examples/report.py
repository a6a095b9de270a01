"""What the examples share and what has nothing to do with gossip: options, progress, results."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gossip_hvd import ranks as hvd
from gossip_hvd import session

BAR = 20


def options(description: str, epochs: int) -> argparse.ArgumentParser:
    """The options of every example; what is not given is left to gossip_hvd and its environment."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--method", help="allreduce, crossover (the default) or gossip")
    parser.add_argument(
        "--timing", help="atc: exchange after the step (the default); awc: under the next one"
    )
    parser.add_argument("--scope", help="where Horovod lives: node (the default) or world")
    parser.add_argument(
        "--node-size", type=int, help="so many ranks are a node (by default those of a machine)"
    )
    parser.add_argument(
        "--epochs", type=int, default=epochs, help=f"passes over the training data ({epochs})"
    )
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="train once for each of these (0)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    return parser


def chosen(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Arguments of ``DistributedOptimizer``: the seed, and of the rest only what was given."""
    given = {"method": args.method, "timing": args.timing}
    return {"seed": seed, **{name: value for name, value in given.items() if value is not None}}


class Training:
    """Counts epochs and seconds; rank 0 says after each epoch how far it is.

    A launcher puts its own mark before every line of a rank, so progress is a line an epoch and
    not one that is redrawn.
    """

    def __init__(self, seed: int, epochs: int) -> None:
        self.seed, self.seconds = seed, 0.0
        self._epochs = epochs
        self._losses: list[float] = []

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs; the clock runs while the caller trains."""
        hvd.barrier()
        started = time.monotonic()
        for epoch in range(self._epochs):
            self._losses.clear()
            yield epoch
            self.seconds = time.monotonic() - started
            if hvd.rank() == 0:
                self._show(epoch + 1)

    def saw(self, loss: float) -> None:
        """Note one step's loss."""
        self._losses.append(loss)

    def _show(self, epoch: int) -> None:
        bar = "#" * (BAR * epoch // self._epochs)
        loss = sum(self._losses) / max(1, len(self._losses))
        print(
            f"seed {self.seed}, epoch {epoch:2d} of {self._epochs} [{bar:.<{BAR}}] "
            f"loss {loss:.3f}, {self.seconds:.1f} s",
            flush=True,
        )


def mean_over_ranks(value: float, name: str) -> float:
    """The mean of one number over all ranks, in double precision."""
    return float(session.current().world.sum([value], name)[0] / hvd.size())


def results(training: Training, gossip: Any, distance: float, sent: int, **quality: float) -> dict:
    """One seed's line of the results: what the caller measured, and what it cost."""
    per_rank = mean_over_ranks(sent, "bytes")
    return {
        "seed": training.seed,
        **quality,
        "seconds": mean_over_ranks(training.seconds, "seconds"),
        "rounds": gossip.round,
        "bytes_per_rank": per_rank,
        "bytes_per_node": per_rank * hvd.size() / hvd.nodes(),
        "consensus_distance": distance,
    }


def finish(args: argparse.Namespace, method: str, runs: Sequence[dict]) -> None:
    """Rank 0 prints the results and writes them to ``--json``."""
    if hvd.rank() != 0:
        return
    setting = {
        "method": method,
        "timing": args.timing or "atc",
        "ranks": hvd.size(),
        "nodes": hvd.nodes(),
        "epochs": args.epochs,
    }
    table = Table(title=", ".join(f"{name} {value}" for name, value in setting.items()))
    for name in runs[0]:
        table.add_column(_title(name), justify="right")
    for run in runs:
        table.add_row(*(_text(name, value) for name, value in run.items()))
    # One text in one piece: a launcher marks every piece that it forwards.
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="", flush=True)
    if args.json:
        args.json.write_text(json.dumps({**setting, "runs": list(runs)}, indent=1) + "\n")


def _title(name: str) -> str:
    if name.startswith("bytes_per_"):
        name = f"MB sent a {name.removeprefix('bytes_per_')}"
    return name.replace("_", " ")


def _text(name: str, value: float) -> str:
    if name.startswith("bytes"):
        return f"{value / 1e6:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1f}" if name == "seconds" else f"{value:.4f}"
