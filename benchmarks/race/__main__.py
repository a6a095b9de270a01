"""Run all contenders in turn, several times over, and print and save one table and one plot.

    python -m benchmarks.race                       # everything: about two hours on two cores
    python -m benchmarks.race --contenders alone,shift,horovod --repeats 1 --steps 10
    python -m benchmarks.race --repeats 1 --go-on   # one turn more, in the same table
    python -m benchmarks.race --list

A time is the wall of all steps after three for warming up, drain included, of the slowest rank,
divided by their number. Needs root (see benchmarks/testbed).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

from rich.console import Console

from benchmarks.race.contenders import CONTENDERS, LIMIT, Contender
from benchmarks.race.launch import ROOT, Bench, ContenderError, launch, timed
from benchmarks.race.report import Race, plot, table
from benchmarks.testbed import NAME, NETWORK, Testbed, TestbedError, die_tidily, refusal

RESULTS = ROOT / "benchmarks" / "results"
CALM = "calm"


def main(words: Sequence[str] | None = None) -> int:
    """Race; returns the exit status."""
    asked = _parser().parse_args(words)
    console = Console(width=max(130, Console().width))
    if asked.list:
        for contender in CONTENDERS.values():
            console.print(f"{contender.name:22} {contender.title}")
        return 0
    if reason := refusal():
        console.print(f"race: {reason}", style="red", highlight=False)
        return 2
    bench = Bench(
        asked.hosts,
        asked.ranks_per_host,
        asked.rate if asked.rate != "none" else None,
        round(asked.megabytes * 1e6),
        asked.compute,
        asked.steps,
        asked.stragglers,
    )
    race = Race(json.loads(json.dumps(asdict(bench))), _about())
    if asked.go_on:
        earlier = Race.saved(json.loads((RESULTS / f"{asked.save}.json").read_text()))
        if earlier.bench != race.bench:
            console.print(f"race: {asked.save} was another bench: {earlier.bench}", style="red")
            return 2
        race = earlier
    bed = Testbed(bench.hosts, bench.rate, name=asked.name, network=asked.network)
    with _saved(race, asked.save, console), bed:
        for turn in range(asked.repeats):
            _turn(bed, bench, asked.contenders, race, console, turn)
    console.print(table(race))
    return 1 if race.failures else 0


def _turn(
    bed: Testbed,
    bench: Bench,
    contenders: Sequence[Contender],
    race: Race,
    console: Console,
    turn: int,
) -> None:
    """The limit once, then every contender once; a failure is noted and the race goes on."""
    _attempt(race, console, LIMIT.name, lambda: race.limits.append(_limit(bed, bench)))
    for contender in contenders:
        if any(bench.late):
            calm = replace(bench, late=(0.0, 0.0))
            _attempt(race, console, contender.name, partial(_run, race, bed, calm, contender, CALM))
        before = len(race.runs.get(contender.name, ()))
        _attempt(race, console, contender.name, partial(_run, race, bed, bench, contender))
        for last in race.runs.get(contender.name, [])[before:]:
            console.print(
                f"turn {turn + 1}  {contender.name:22} {last.wall:6.3f} s a step, worst "
                f"{last.worst:.2f}, load {last.load[0]:.1f} → {last.load[1]:.1f}, "
                f"overslept {last.overslept:.2f} s",
                highlight=False,
            )


def _run(race: Race, bed: Testbed, bench: Bench, contender: Contender, kind: str = "") -> None:
    race.add(timed(bed, bench, contender), kind)


def _attempt(race: Race, console: Console, name: str, run: Callable[[], None]) -> None:
    try:
        run()
    except ContenderError as error:
        race.failures.append((name, str(error).partition("\n")[0]))
        console.print(f"{name} failed: {error}", style="red", markup=False, highlight=False)


def _limit(bed: Testbed, bench: Bench) -> dict[str, list[float]]:
    if bench.hosts == 1:
        return {}
    found = launch(bed, bench, LIMIT)[0]["transfers"]
    return {wire: entry["seconds"] for wire, entry in found.items()}


@contextlib.contextmanager
def _saved(race: Race, stem: str, console: Console) -> Iterator[None]:
    """Save what there is, also of a race that was stopped."""
    try:
        yield
    finally:
        if race.runs:
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{stem}.json").write_text(json.dumps(race.plain(), indent=1) + "\n")
            plot(race, RESULTS / f"{stem}.png")
            console.print(f"saved {RESULTS / stem}.json and .png", highlight=False)


def _about() -> dict[str, str]:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown",
        "command": "python -m benchmarks.race " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "python": platform.python_version(),
    }


def _contenders(text: str) -> list[Contender]:
    if text == "all":
        return list(CONTENDERS.values())
    try:
        return [CONTENDERS[name] for name in text.split(",")]
    except KeyError as error:
        raise argparse.ArgumentTypeError(
            f"no contender {error}; there are {', '.join(CONTENDERS)}"
        ) from None


def _stragglers(text: str) -> tuple[float, float]:
    chance, seconds = text.split(",")
    return float(chance), float(seconds)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add = made.add_argument
    add("--list", action="store_true", help="list the contenders and end")
    add("--contenders", type=_contenders, default=list(CONTENDERS.values()), metavar="A,B,…")
    add("--repeats", type=int, default=3, help="turns; contenders are interleaved")
    add("--steps", type=int, default=40)
    add("--hosts", type=int, default=4)
    add("--ranks-per-host", type=int, default=2)
    add("--rate", default="200mbit", help="of every link, in and out; `none` leaves it unshaped")
    add("--megabytes", type=float, default=34.0, help="of the model, in float32")
    add("--compute", type=float, default=1.0, help="seconds a step, asleep")
    add(
        "--stragglers",
        type=_stragglers,
        default=(0.0, 0.0),
        metavar="P,SECONDS",
        help="each host is late in each step with chance P by SECONDS; also runs without",
    )
    add("--save", default="race", metavar="STEM", help="file name under benchmarks/results")
    add("--go-on", action="store_true", help="add turns to those that are saved there")
    add("--name", default=NAME, help="prefix of the hosts' names")
    add("--network", type=int, default=NETWORK, help="addresses are 10.77.THIS.x")
    return made


if __name__ == "__main__":
    die_tidily()
    try:
        sys.exit(main())
    except TestbedError as error:
        sys.exit(f"race: {error}")
