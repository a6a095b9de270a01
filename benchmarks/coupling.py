"""How long a node's own all-reduce takes while gossip is in flight, beside its time alone.

    python -m benchmarks.coupling [--hosts 4] [--rate 200mbit] [--megabytes 34]

Every node all-reduces 1 MB between its two ranks again and again, first with idle links, then while
a model's exchange runs behind it. Needs root (see benchmarks/testbed).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.race.__main__ import RESULTS
from benchmarks.race.contenders import Contender
from benchmarks.race.launch import Bench, launch
from benchmarks.testbed import NAME, NETWORK, Testbed, TestbedError, die_tidily

OPTIONS = {"method": "crossover", "timing": "awc"}


def main() -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coupling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--megabytes", type=float, default=34.0)
    parser.add_argument("--save", default="coupling", metavar="STEM")
    parser.add_argument("--name", default=NAME, help="prefix of the hosts' names")
    parser.add_argument("--network", type=int, default=NETWORK)
    asked = parser.parse_args()
    bench = Bench(hosts=asked.hosts, rate=asked.rate, nbytes=round(asked.megabytes * 1e6))
    probe = Contender("coupling", "", "coupling", ("--options", json.dumps(OPTIONS)))
    with Testbed(asked.hosts, asked.rate, name=asked.name, network=asked.network) as bed:
        ranks = launch(bed, bench, probe)
    found = {
        kind: sorted(t for rank in ranks for t in rank[kind])
        for kind in ("idle", "busy", "transfers")
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    points = {kind: statistics.quantiles(times, n=100) for kind, times in found.items()}
    kept = {"times": {kind: len(times) for kind, times in found.items()}, "percentiles": points}
    (RESULTS / f"{asked.save}.json").write_text(json.dumps(kept, indent=1) + "\n")
    table = Table(title=f"all-reduce of 1 MB inside a node, {asked.hosts} hosts × 2 ranks")
    for column in ("", "times", "median ms", "99th percentile ms", "longest ms"):
        table.add_column(column, justify="right")
    for kind in ("idle", "busy"):
        times = found[kind]
        row = (statistics.median(times), times[int(0.99 * len(times))], times[-1])
        table.add_row(kind, f"{len(times)}", *(f"{1e3 * t:.2f}" for t in row))
    table.caption = f"transfer under way: {statistics.median(found['transfers']):.2f} s (median)"
    Console().print(table)
    return 0


if __name__ == "__main__":
    die_tidily()
    try:
        sys.exit(main())
    except TestbedError as error:
        sys.exit(f"coupling: {error}")
