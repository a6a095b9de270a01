"""What a round costs a rank beside the wire: planning it, and mixing what arrived.

    python -m benchmarks.micro [--json]

Planning: microseconds a round of one node's own transfers, for 16 segments. Mixing: bandwidth for
its own traffic (what it reads and writes once), beside ``memcpy``'s for the same array; median of
the repeats. One thread, like everything a rank does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.micro_planning import SIZES, measure
from gossip_hvd.methods import method_of
from gossip_hvd.mixing import combine

MEGABYTES = (1, 17, 34)
REPEATS = 9


def planning(segments: int = 16) -> dict[str, dict[int, tuple[float, float] | None]]:
    """Least and median microseconds a round of ``Method.plan``, by method and nodes."""
    methods = {
        f"crossover {peers}": method_of("crossover", peers=peers)
        for peers in ("fair", "uniform", "shift", "unfair")
    }
    methods["gossip one_peer_exponential"] = method_of("gossip")
    methods["gossip ring"] = method_of("gossip", topology="ring")

    def planner(method: Any) -> Callable[[int, int], object]:
        states = {n: method.start(n, segments, 7) for n in SIZES}
        return lambda n, number: method.plan(states[n], number, 1)

    return {name: {n: measure(planner(m), n, 200, 5) for n in SIZES} for name, m in methods.items()}


def mixing(megabytes: int) -> dict[str, float]:
    """Gigabytes a second of memcpy and of three kinds of mixing, for an array of that size."""
    n = megabytes * 1_000_000 // 4
    rng = np.random.default_rng(0)
    now, other, third = (rng.random(n, np.float32) for _ in range(3))
    short, shorter = now.astype(ml_dtypes.bfloat16), other.astype(ml_dtypes.bfloat16)
    return {
        "memcpy": _bandwidth(2, now, lambda: np.copyto(third, now)),
        "fresh float32": _bandwidth(3, now, lambda: combine(now, now, [other], [0.5], now)),
        "late float32": _bandwidth(4, now, lambda: combine(now, other, [third], [0.5], now)),
        "late bfloat16": _bandwidth(3, now, lambda: combine(now, short, [shorter], [0.5], now)),
    }


def _bandwidth(streams: float, array: np.ndarray, run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return streams * array.nbytes / statistics.median(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    results = {"planning_us": planning(), "mixing_gb_s": {mb: mixing(mb) for mb in MEGABYTES}}
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'planning, µs a round':32}" + "".join(f"{f'n={n}: least, median':>24}" for n in SIZES))
    for name, row in results["planning_us"].items():
        costs = (f"{c[0]:10.0f} {c[1]:10.0f}" if c else "refused" for c in row.values())
        print(f"{name:32}" + "".join(f"{cost:>24}" for cost in costs))
    print(f"\n{'mixing, GB/s (of memcpy)':32}" + "".join(f"{f'{mb} MB':>24}" for mb in MEGABYTES))
    for kind in next(iter(results["mixing_gb_s"].values())):
        rates = [(row[kind], row["memcpy"]) for row in results["mixing_gb_s"].values()]
        print(f"{kind:32}" + "".join(f"{f'{r:.1f} ({r / m:.2f})':>24}" for r, m in rates))


if __name__ == "__main__":
    main()
