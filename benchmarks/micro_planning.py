"""What it costs a node to plan its own part of every round, for each topology and size.

Planned is what the engine asks a method for: the transfers of all segments, both ways.


    python -m benchmarks.micro_planning [--json] [--rounds 200] [--repeats 5] [--segments 16]

Each repeat plans `rounds` new rounds one after the other, all segments of a round in one call,
so no round is found in a cache; a repeat's number is its mean. Printed: the least and the median
over the repeats, in microseconds a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods import SGP, AllReduce, Ceca, State
from gossip_hvd.methods.gossip import mixing_round
from gossip_hvd.topology import TOPOLOGIES, Topology

SIZES = (4, 64, 1024)
Planner = Callable[[int, int], object]


def planners(segments: int) -> dict[str, Planner]:
    """For each name a function (n, round) that plans one round of node 1."""

    def over(topology: Topology) -> Planner:
        return lambda n, round: mixing_round(topology, State(n, segments, 7), round, 1)

    found = {name: over(kind()) for name, kind in TOPOLOGIES.items()}
    for method in (Ceca(), SGP(), AllReduce()):
        start = lru_cache(lambda n, method=method: method.start(n, segments, 7))
        found[f"method {method.name}"] = lambda n, round, method=method, start=start: method.plan(
            start(n), round, 1
        )
    return found


def measure(planner: Planner, n: int, rounds: int, repeats: int) -> tuple[float, float] | None:
    """Least and median microseconds a round, or None where the topology refuses n."""
    try:
        planner(n, 0)
    except ConfigError:
        return None
    means = []
    for repeat in range(repeats):
        first = 1 + repeat * rounds
        begin = time.perf_counter_ns()
        for round in range(first, first + rounds):
            planner(n, round)
        means.append((time.perf_counter_ns() - begin) / rounds / 1000)
    return min(means), statistics.median(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--segments", type=int, default=16)
    args = parser.parse_args()
    results = {
        name: {n: measure(planner, n, args.rounds, args.repeats) for n in SIZES}
        for name, planner in planners(args.segments).items()
    }
    setup = {
        "unit": "microseconds a round, own part, all segments: [least, median]",
        "segments": args.segments,
        "rounds": args.rounds,
        "repeats": args.repeats,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    if args.json:
        print(json.dumps({"setup": setup, "results": results}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in setup.items()))
    print(f"{'topology':24}" + "".join(f"{f'n={n}: least, median':>24}" for n in SIZES))
    for name, row in results.items():
        cells = (
            "refused" if cost is None else f"{cost[0]:10.1f} {cost[1]:10.1f}"
            for cost in row.values()
        )
        print(f"{name:24}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
