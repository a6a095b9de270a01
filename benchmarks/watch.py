"""What the watch, the ring buffer and the look for NaN cost a step: `python -m benchmarks.watch`.

The reference step is that of the race: 34 MB of float32 in 34 cells, 1.0 s of compute, nodes of two
ranks, so a rank carries 17 MB in 17 cells, sends and receives each, and shares each with its
sibling. Every part is timed alone, on this machine, by its best of several repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from gossip_hvd.finite import finite
from gossip_hvd.frames import in_debugger, user_line
from gossip_hvd.recorder import Recorder
from gossip_hvd.waits import Facts, waiting
from gossip_hvd.watch import TICK

STEP = 1.0
CELLS, CELL = 17, 1 << 18
WAITS = 40
"""Gradients that a rank waits for, and a few exchanges."""
EVENTS = CELLS * 7 + 20
"""Send, sent, received, mixed, and the node's gather; posts and words."""


def seconds(body: Callable[[], object], times: int = 2000, repeats: int = 7) -> float:
    """The best mean of a call."""
    best = float("inf")
    for _ in range(repeats):
        since = time.perf_counter()
        for _ in range(times):
            body()
        best = min(best, (time.perf_counter() - since) / times)
    return best


def main() -> None:
    """Print a table."""
    facts, record = Facts("a wait"), Recorder()
    values = np.random.default_rng(0).normal(size=CELL).astype(np.float32)

    def wait() -> None:
        with waiting(facts):
            pass

    rows = [
        ("announce a wait", seconds(wait), WAITS),
        ("note an event", seconds(lambda: record("sent", 1, 0, 2, 3, 4)), EVENTS),
        ("look at a cell of 1 MB for NaN", seconds(lambda: finite(values), 100), CELLS),
        ("one look of the watch", seconds(lambda: (in_debugger(), user_line()), 200), STEP / TICK),
    ]
    print("| part | µs each | times a step | % of a step of 1.0 s |\n|---|--:|--:|--:|")
    for what, each, times in rows:
        print(f"| {what} | {each * 1e6:.2f} | {times:.0f} | {100 * each * times / STEP:.4f} |")
    total = sum(each * times for _, each, times in rows)
    print(f"| all | | | {100 * total / STEP:.4f} |")


if __name__ == "__main__":
    main()
