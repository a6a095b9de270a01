"""Seeded faults: thousands of small runs of every method in which messages and ranks misbehave.

    python tests/soak.py [--runs 1000] [--method gossip] [--seed 17]

A seed decides everything: size, timing, wire, what happens to which message, which rank is slow or
stops. A run must end with exactly the bits of the same run without faults, or with an error that
names a rank; it may neither hang nor differ. So no sum that mixing conserves can be lost unseen.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache

from rows import ROWS, SLOTS, Quadratic, simulation, train

from gossip_hvd.errors import PeerLostError, StallError
from gossip_hvd.methods import METHODS
from gossip_hvd.rounds import WEIGHTS
from gossip_hvd.transport.faults import HARMFUL, HARMLESS, Faults

STEPS = 6
SIZES = (2, 3, 4, 5)
OUTCOMES = ("same", "same after faults", "named")


@dataclass(frozen=True)
class Case:
    """One run, without its faults.

    Attributes:
        name: of the row.
        nodes: how many.
        timing: of the engine.
    """

    name: str
    nodes: int
    timing: str


def case_of(method: str, seed: int) -> Case:
    """What this seed runs."""
    draw = random.Random(f"{method} {seed}")
    name = draw.choice([name for name, row in ROWS.items() if row.method.name == method])
    row = ROWS[name]
    sizes = [n for n in SIZES if n % 2 == 0 or not row.even]
    return Case(name, draw.choice(sizes), draw.choice(row.method.timings))


def faults_of(case: Case, seed: int) -> Faults:
    """What this seed does to it."""
    draw = random.Random(f"faults {seed}")
    ranks = range(simulation(ROWS[case.name], case.nodes, case.timing).cluster.size)
    kind = draw.choice(["harmless", "slow", "lost", "cut", "stopped", "all"])
    rates = {k: draw.choice([0.0, 0.02, 0.3]) for k in HARMLESS}
    if kind == "slow":
        return Faults(seed, rates, slow={r: draw.choice([0.0, 0.5, 0.8]) for r in ranks})
    if kind == "stopped":
        return Faults(seed, rates, stopped={draw.choice(ranks): draw.randrange(60)})
    if kind in ("lost", "cut"):
        what = {"lost": "drop", "cut": "truncate"}[kind]
        return Faults(seed, rates, {draw.randrange(200): what})
    if kind == "all":
        return Faults(seed, {**rates, **dict.fromkeys(HARMFUL, 0.002)})
    return Faults(seed, rates)


def trained(case: Case, faults: Faults, order: int) -> tuple[list[bytes], int]:
    """The bits of every rank and slot after all steps, and how many messages were hit."""
    row, task = ROWS[case.name], Quadratic.draw(case.nodes, 1.0)
    sim = simulation(row, case.nodes, case.timing, faults=faults, order=order)
    for t in range(STEPS):
        train(sim, row, task, t)
    sim.drain()
    ranks = range(sim.cluster.size)
    hit = sum(bool(faults.fate(i)) for i in range(sim.board.sent))
    return [sim.values(r, slot).tobytes() for r in ranks for slot in (WEIGHTS, *SLOTS)], hit


@cache
def expected(case: Case) -> list[bytes]:
    """What a run without faults gives."""
    return trained(case, Faults(), 0)[0]


def run(method: str, seed: int) -> str:
    """One run; returns its outcome.

    Raises:
        AssertionError: where it differs in silence; the text says how to repeat it.
    """
    case = case_of(method, seed)
    faults = faults_of(case, seed)
    try:
        found, hit = trained(case, faults, seed)
    except (StallError, PeerLostError) as error:
        harmful = bool(faults.stopped) or any(
            kind in HARMFUL for kind in (*faults.rates, *faults.schedule.values())
        )
        assert harmful, f"an error without a cause: {error}\n{again(method, seed)}"
        assert "rank " in str(error), f"nobody is named: {error}\n{again(method, seed)}"
        return "named"
    assert found == expected(case), (
        f"silently another result: {case}, {faults}\n{again(method, seed)}"
    )
    return "same after faults" if hit or faults.slow else "same"


def again(method: str, seed: int) -> str:
    """The command that repeats a run."""
    return f"to repeat it: python tests/soak.py --method {method} --seed {seed}"


def main() -> int:
    """Run them all; prints a line a method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000, help="seeds of each method")
    parser.add_argument("--method", help="one method only")
    parser.add_argument("--seed", type=int, help="one seed only")
    asked = parser.parse_args()
    seeds = range(asked.runs) if asked.seed is None else [asked.seed]
    print(f"{'method':24}{'runs':>7}{'seconds':>9}" + "".join(f"{o:>20}" for o in OUTCOMES))
    for method in sorted(METHODS) if asked.method is None else [asked.method]:
        since, seen = time.monotonic(), Counter[str]()
        for seed in seeds:
            seen[run(method, seed)] += 1
        seconds = time.monotonic() - since
        counts = "".join(f"{seen[outcome]:>20}" for outcome in OUTCOMES)
        print(f"{method:24}{len(seeds):>7}{seconds:>9.1f}{counts}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
