"""All-reduce and Crossover-SGD on four ranks of this machine, over three seeds, in one table.

Run by ``make demo`` with ``torch_digits.py`` and by ``make demo-keras`` with ``keras_digits.py``,
which it starts under ``horovodrun`` four times: with either method, the ranks as four nodes of one
and as two nodes of two. Ends with an error where the
merged model is not as good as it should be.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

EXAMPLE = Path(__file__).with_name(sys.argv[1] if sys.argv[1:] else "torch_digits.py")
RANKS = 4
SEEDS = (0, 1, 2)
EPOCHS = 10
NODE_SIZES = (1, 2)
METHODS = ("allreduce", "crossover")
LEAST_ACCURACY = 0.97
LARGEST_LOSS = 0.01
SECONDS_A_RUN = 600.0
SECONDS_TO_END = 10.0

# More ranks than cores: each computes with one thread and gives its core away while it waits.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
}

# (name, column's title, from the unit of the JSON file to that of the table, its format)
COLUMNS = (
    ("merged_accuracy", "merged\naccuracy\n%", 100, ".1f"),
    ("replicas_accuracy", "mean of\nreplicas\n%", 100, ".1f"),
    ("seconds", "training\n\nseconds", 1, ".1f"),
    ("bytes_per_rank", "sent a\nrank\nMB", 1e-6, ".0f"),
    ("bytes_per_node", "sent a\nnode\nMB", 1e-6, ".0f"),
    ("consensus_distance", "consensus\ndistance\n10⁻³", 1e3, ".1f"),
)


class DemoError(Exception):
    """Something that ends the demo; its text is all that is shown."""


def main() -> int:
    started = time.monotonic()
    console = Console()
    console.print(
        f"{RANKS} ranks learn to read handwritten digits, {EPOCHS} epochs, "
        f"seeds {', '.join(map(str, SEEDS))}."
    )
    try:
        found = run_all(console)
    except DemoError as error:
        console.print(f"\nmake demo: {error}", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nmake demo: interrupted")
        return 130
    console.print(table(found))
    console.print(
        "Mean ± standard deviation over seeds, on pictures nobody trained with. Seconds are of "
        "training alone. Sent is what gossip_hvd itself sends, to other nodes and inside a node. "
        "Between two nodes ½ + ½ is the exact mean, so their distance is zero."
    )
    complaints = judge(found)
    for complaint in complaints:
        console.print(complaint, style="bold red")
    console.print(f"{'Failed' if complaints else 'Good'} after {time.monotonic() - started:.0f} s.")
    return 1 if complaints else 0


def run_all(console: Console) -> dict[tuple[str, int], list[dict]]:
    """Every launch's results, by method and size of a node."""
    settings = [(method, size) for size in NODE_SIZES for method in METHODS]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
    )
    found = {}
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        for method, node_size in settings:
            task = progress.add_task(f"{method}, {nodes(node_size)}", total=EPOCHS * len(SEEDS))
            file = Path(folder) / f"{method}-{node_size}.json"
            arguments = ["--method", method, "--node-size", f"{node_size}", "--json", f"{file}"]
            arguments += ["--epochs", f"{EPOCHS}", "--seed", *map(str, SEEDS)]
            launch(arguments, lambda task=task: advance(progress, task))
            found[method, node_size] = json.loads(file.read_text())["runs"]
    return found


def advance(progress: Progress, task: TaskID) -> None:
    """One epoch more; where no bar can be drawn, a line for each seed."""
    progress.advance(task)
    now = progress.tasks[task]
    if not progress.console.is_terminal and now.completed % EPOCHS == 0:
        print(f"{now.description}: {now.completed:.0f} of {now.total:.0f} epochs", flush=True)


def launch(arguments: list[str], epoch_done: Callable[[], None]) -> None:
    """Run the example under horovodrun, in a process group that ends with this program.

    Raises:
        DemoError: it failed or took too long; the text ends with what it printed.
    """
    programs = Path(sys.executable).parent
    command = [f"{programs / 'horovodrun'}", "-np", f"{RANKS}", sys.executable, f"{EXAMPLE}"]
    environment = {**os.environ, **ENVIRONMENT}
    environment["PATH"] = f"{programs}{os.pathsep}{environment.get('PATH', '')}"
    process = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    lines = []
    deadline = time.monotonic() + SECONDS_A_RUN
    timer = threading.Timer(SECONDS_A_RUN, end, [process])
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if re.search(r"epoch +\d+ of", line):
                epoch_done()
        code = process.wait()
    finally:
        timer.cancel()
        end(process)
    if code != 0:
        why = "took too long" if time.monotonic() > deadline else f"ended with {code}"
        raise DemoError(f"{' '.join([*command, *arguments])} {why}:\n{''.join(lines[-60:])}")


def end(process: subprocess.Popen) -> None:
    """End a process group that still runs: the launcher, which then ends its ranks."""
    for word in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + SECONDS_TO_END
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, word)
            except ProcessLookupError:
                return
            word = 0  # from now on only ask whether it is still there
            time.sleep(0.1)


def table(found: dict[tuple[str, int], list[dict]]) -> Table:
    """One line a launch."""
    result = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    result.add_column("method", no_wrap=True)
    result.add_column("nodes", no_wrap=True)
    for _, title, _, _ in COLUMNS:
        result.add_column(title, justify="right", no_wrap=True)
    for (method, node_size), runs in found.items():
        cells = [
            mean_and_spread([run[name] * unit for run in runs], form)
            for name, _, unit, form in COLUMNS
        ]
        result.add_row(method, nodes(node_size), *cells)
    return result


def mean_and_spread(values: list[float], form: str) -> str:
    """Such as ``98.9 ±0.2``; without the second where all values are one."""
    spread = statistics.stdev(values)
    return f"{statistics.mean(values):{form}}" + (f" ±{spread:{form}}" if spread else "")


def judge(found: dict[tuple[str, int], list[dict]]) -> list[str]:
    """What is not as it should be, in sentences."""
    complaints = []
    merged = {key: [run["merged_accuracy"] for run in runs] for key, runs in found.items()}
    for (method, node_size), values in merged.items():
        where, least = f"{method}, {nodes(node_size)}", min(values)
        if least < LEAST_ACCURACY:
            complaints.append(f"{where}: accuracy {least:.1%}, less than {LEAST_ACCURACY:.0%}")
        loss = statistics.mean(merged["allreduce", node_size]) - statistics.mean(values)
        if loss > LARGEST_LOSS:
            complaints.append(f"{where}: {100 * loss:.1f} points below all-reduce")
    return complaints


def nodes(node_size: int) -> str:
    """Such as ``2 of 2``."""
    return f"{RANKS // node_size} of {node_size}"


if __name__ == "__main__":
    sys.exit(main())
