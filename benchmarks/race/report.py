"""What a race found: one table, one plot, plain data to save."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.race.contenders import CONTENDERS, Contender
from benchmarks.race.launch import Result

REFERENCES = ("horovod", "horovod-tuned")
"""Whom all others are compared with: the first that has run."""


@dataclass
class Race:
    """All runs so far.

    Attributes:
        bench: the setting.
        about: commit, command, machine.
        limits: for each turn, seconds of every plain transfer by wire.
        runs: by contender.
        calm: the same without stragglers, where there are some.
        failures: contender and what it said.
    """

    bench: dict[str, Any]
    about: dict[str, str]
    limits: list[dict[str, list[float]]] = field(default_factory=list)
    runs: dict[str, list[Result]] = field(default_factory=dict)
    calm: dict[str, list[Result]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def saved(cls, plain: dict[str, Any]) -> Race:
        """From what ``plain`` gave, to go on with."""
        made = cls(plain["bench"], plain["about"], plain["limits"])
        for kind in ("runs", "calm"):
            for name, entries in plain[kind].items():
                for e in entries:
                    times = e["seconds"], e["worst"], e["cpu"], tuple(e["load"]), e["overslept"]
                    made.add(
                        Result(name, *times, e["steps"], plain["versions"], []),
                        "calm" if kind == "calm" else "",
                    )
        return made

    def add(self, result: Result, kind: str = "") -> None:
        """Note one run."""
        found = self.calm if kind else self.runs
        found.setdefault(result.name, []).append(result)

    def median(self, name: str) -> float:
        """Seconds a step, over the repeats."""
        return statistics.median(run.wall for run in self.runs[name])

    @property
    def compute(self) -> float:
        """Seconds a step of the contender that sends nothing, else the nominal seconds."""
        return self.median("alone") if "alone" in self.runs else float(self.bench["compute"])

    def transfer(self, wire: str) -> float:
        """Median seconds of one model out and in over plain sockets; 0 where not measured."""
        times = [t for turn in self.limits for t in turn.get(wire, ())]
        return statistics.median(times) if times else 0.0

    def limit(self, contender: Contender) -> float:
        """The larger of compute and transfer; their sum for who cannot overlap them."""
        return contender.limit(
            self.compute, self.transfer(contender.wire), int(self.bench["hosts"])
        )

    def delay(self, name: str) -> float | None:
        """Mean seconds a step that stragglers cost, where both kinds were run."""
        if name not in self.calm:
            return None
        calm = statistics.median(run.wall for run in self.calm[name])
        return self.median(name) - calm

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""

        def entry(run: Result) -> dict[str, Any]:
            return {
                "seconds": round(run.wall, 4),
                "worst": round(run.worst, 4),
                "cpu": round(run.cpu, 3),
                "load": run.load,
                "overslept": round(run.overslept, 3),
                "steps": [round(s, 3) for s in run.steps],
            }

        def entries(runs: dict[str, list[Result]]) -> dict[str, list[dict[str, Any]]]:
            return {name: [entry(run) for run in found] for name, found in runs.items()}

        return {
            "about": self.about,
            "bench": self.bench,
            "versions": self.versions(),
            "compute": self.compute,
            "transfer": {w: self.transfer(w) for w in ("float32", "16-bit")},
            "limits": self.limits,
            "runs": entries(self.runs),
            "calm": entries(self.calm),
            "failures": self.failures,
        }

    def versions(self) -> dict[str, str]:
        """Of everything that ran."""
        found: dict[str, str] = {}
        for runs in self.runs.values():
            found.update(runs[-1].about)
        return found


def table(race: Race) -> Table:
    """The race as one table, in the order of the contenders' list."""
    bench = race.bench
    versions = ", ".join(f"{name} {version}" for name, version in race.versions().items())
    made = Table(
        title=(
            f"{bench['hosts']} hosts × {bench['ranks']} ranks, {bench['rate'] or 'unshaped'}, "
            f"{bench['nbytes'] / 1e6:g} MB, {bench['compute']:g} s of compute, "
            f"{bench['steps']} steps"
        ),
        caption=(
            f"compute {race.compute:.3f} s · one model out and in over plain TCP sockets "
            f"{race.transfer('float32'):.3f} s, half of it {race.transfer('16-bit'):.3f} s · "
            f"limit = the larger, for ATC their sum\n"
            f"{versions}\n{race.about['commit']}, {race.about['date']}"
        ),
    )
    made.add_column("contender")
    columns = ("s a step", "min–max", "worst step", "× limit", "worst × limit", "× Horovod")
    for column in (*columns, "CPU s", "load", "overslept"):
        made.add_column(column, justify="right")
    if race.calm:
        made.add_column("stragglers' delay", justify="right")
    for name in (n for n in CONTENDERS if n in race.runs):
        made.add_row(*_row(race, name))
    return made


def _row(race: Race, name: str) -> list[str]:
    runs = race.runs[name]
    walls = sorted(run.wall for run in runs)
    median, limit = race.median(name), race.limit(CONTENDERS[name])
    worst = max(run.worst for run in runs)
    beside = next((one for one in REFERENCES if one in race.runs), None)
    faster = "–" if beside is None else f"{race.median(beside) / median:.2f}"
    load = statistics.mean(max(run.load) for run in runs)
    cells = [
        CONTENDERS[name].title,
        f"{median:.3f}",
        f"{walls[0]:.3f}–{walls[-1]:.3f}",
        f"{worst:.2f}",
        f"{median / limit:.3f}",
        f"{worst / limit:.2f}",
        faster,
        f"{statistics.median(run.cpu for run in runs):.2f}",
        f"{load:.1f}",
        f"{max(run.overslept for run in runs):.2f}",
    ]
    delay = race.delay(name)
    if race.calm:
        cells.append("–" if delay is None else f"{delay:+.3f}")
    return cells


def plot(race: Race, path: Path) -> None:
    """Bars of the medians with the spread of the repeats, and every step as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [n for n in CONTENDERS if n in race.runs][::-1]
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.42 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        runs = race.runs[name]
        walls = [run.wall for run in runs]
        ours = CONTENDERS[name].program == "gossip"
        axes.barh(place, race.median(name), color="#3b6ea8" if ours else "#b8b8b8", height=0.62)
        axes.plot([min(walls), max(walls)], [place, place], color="black", linewidth=2)
        steps = [step for run in runs for step in run.steps]
        axes.plot(steps, [place] * len(steps), "|", color="#d1495b", alpha=0.35, markersize=9)
    titles = [CONTENDERS[n].title for n in names]
    for place, name in enumerate(names):
        if titles[place].startswith("…"):
            titles[place] = f"{_before(name)} {titles[place]}"
    axes.set_yticks(range(len(names)), titles)
    axes.axvline(race.compute, color="black", linestyle=":", label="compute alone")
    if transfer := race.transfer("float32"):
        axes.axvline(transfer, color="black", linestyle="--", label="plain sockets, float32")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds a step; bar: median of runs, black: their range, red: single steps")
    bench = race.bench
    axes.set_title(
        f"{bench['hosts']} hosts × {bench['ranks']} ranks, {bench['rate'] or 'unshaped'} a host, "
        f"{bench['nbytes'] / 1e6:g} MB float32, {bench['compute']:g} s compute"
    )
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _before(name: str) -> str:
    """The title that a title beginning with … goes on from."""
    order = list(CONTENDERS)
    for earlier in order[order.index(name) :: -1]:
        if not CONTENDERS[earlier].title.startswith("…"):
            return CONTENDERS[earlier].title
    return ""
