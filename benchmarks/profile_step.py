"""A picture of one step of one host, AWC and ATC: what was posted, sent, received, mixed, when.

    python -m benchmarks.profile_step [--contenders shift,shift-atc] [--host 1] [--step 4]

Runs each contender for a few steps on the testbed (needs root) and draws, over the forward and
backward of one step, every message of the host's ranks from the recorder's events, and the
traffic of the host's link from its own counters. Word, first byte and last byte of one message
are not MPI's to tell; the link's counters show when bytes really move.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.race.__main__ import RESULTS
from benchmarks.race.contenders import CONTENDERS
from benchmarks.race.launch import ROOT, Bench, launch
from benchmarks.testbed import NAME, NETWORK, Testbed, TestbedError, die_tidily

EVENTS = ROOT / "build" / "profile_step"
OUT, IN, MIX = "#3b6ea8", "#d98032", "#2e8b57"
WINDOW = 0.04


@dataclass(frozen=True)
class Profile:
    """One contender's ranks on one host, and the step to look at.

    Attributes:
        title: of the contender.
        ranks: what the host's ranks wrote.
        step: index of the step.
    """

    title: str
    ranks: list[dict[str, Any]]
    step: int

    @property
    def marks(self) -> tuple[float, float, float, float]:
        """Begin, backward, update and end of the step, of the host's first rank."""
        begin, backward, update, end = self.ranks[0]["marks"][self.step]
        return begin, backward, update, end

    def rows(self, rank: dict[str, Any]) -> list[dict[str, Any]]:
        """One row a cell that this rank sent or received between nodes during the step."""
        begin, _, _, end = self.marks
        siblings = {r["rank"] for r in self.ranks}
        posts: dict[int, float] = {}
        words: dict[tuple[int, int], float] = {}
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for when, what, flight, _, cell, peer, _ in rank["events"]:
            if what == "post":
                posts.setdefault(flight, when)
            elif what == "word":
                words[flight, cell] = when
            elif cell >= 0 and peer not in siblings:
                row = rows.setdefault((flight, cell), {"cell": cell, "post": posts[flight]})
                row[what] = when
                if what == "send":
                    row.update(to=peer, word=words.get((flight, cell)))
                elif what == "received":
                    row["source"] = peer
        for sibling in self.ranks:
            for when, what, flight, _, cell, peer, _ in sibling["events"]:
                if what == "received" and peer == rank["rank"] and (flight, cell) in rows:
                    rows[flight, cell]["gathered"] = when
        ends = [(row.get("received", begin), row.get("sent", begin)) for row in rows.values()]
        during = (
            begin < max(pair) and row["post"] < end - 0.01
            for row, pair in zip(rows.values(), ends, strict=True)
        )
        return [row for row, wanted in zip(rows.values(), during, strict=True) if wanted]

    def traffic(self) -> list[tuple[float, float, float]]:
        """Time, Mbit/s in and Mbit/s out of the host's link, over windows of 40 ms."""
        samples = self.ranks[0]["meter"]
        found, last = [], 0
        for i, (when, got, sent) in enumerate(samples):
            before, got_before, sent_before = samples[last]
            if (span := when - before) >= WINDOW:
                megabits = 8e-6 / span
                rates = ((got - got_before) * megabits, (sent - sent_before) * megabits)
                found.append(((when + before) / 2, *rates))
                last = i
        return found


def draw(profiles: list[Profile], path: Any) -> None:
    """One column a profile: the link's traffic above, messages below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        *(2, len(profiles)),
        figsize=(8 * len(profiles), 8),
        height_ratios=[1, 2.6],
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for column, profile in enumerate(profiles):
        _draw_traffic(axes[0][column], profile)
        _draw_messages(axes[1][column], profile)
        for row in (0, 1):
            _draw_phases(axes[row][column], profile, labels=row == 0)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_phases(axes: Any, profile: Profile, *, labels: bool) -> None:
    begin, backward, update, end = (mark - profile.marks[0] for mark in profile.marks)
    phases = (("forward", begin, backward), ("backward", backward, update), ("step", update, end))
    for (name, start, stop), shade in zip(phases, ("0.95", "0.88", "1.0"), strict=True):
        axes.axvspan(start, stop, color=shade, zorder=0)
        if labels:
            axes.text(
                (start + stop) / 2, 1.02, name, ha="center", transform=axes.get_xaxis_transform()
            )
    axes.set_xlim(-0.03, end + 0.02)


def _draw_traffic(axes: Any, profile: Profile) -> None:
    begin = profile.marks[0]
    times, received, sent = zip(*profile.traffic(), strict=True)
    since = [t - begin for t in times]
    axes.plot(since, sent, color=OUT, label="out")
    axes.plot(since, received, color=IN, label="in")
    axes.set_ylabel("Mbit/s on the link")
    axes.set_ylim(0, 260)
    axes.set_title(profile.title, pad=22)
    axes.legend(loc="lower right")


def _draw_messages(axes: Any, profile: Profile) -> None:
    begin, place, ticks = profile.marks[0], 0, []
    for rank in profile.ranks:
        for row in profile.rows(rank):
            _draw_row(axes, row, place, begin)
            ticks.append(
                f"rank {rank['rank']} cell {row['cell']}\n{row.get('source', '?')} → · → "
                f"{row.get('to', '?')}"
            )
            place += 1
    every = 1 + place // 24  # more names than that cannot be read
    axes.set_yticks(range(0, place, every), ticks[::every], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the step began")
    for color, name in ((OUT, "send: given to MPI … complete"), (IN, "receive: posted … complete")):
        axes.plot([], [], color=color, linewidth=4, label=name)
    axes.plot([], [], "|", color="black", label="receiver's word came")
    axes.plot([], [], "D", color=MIX, markersize=4, label="mixed")
    axes.plot([], [], "o", color=MIX, markersize=4, mfc="white", label="at the sibling rank")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3, fontsize=8, frameon=False)


def _draw_row(axes: Any, row: dict[str, Any], place: int, begin: float) -> None:
    if "send" in row and "sent" in row:
        axes.plot([row["send"] - begin, row["sent"] - begin], [place - 0.15] * 2, color=OUT, lw=3)
    if row.get("word"):
        axes.plot([row["word"] - begin], [place - 0.15], "|", color="black", markersize=8)
    if "received" in row:
        axes.plot(
            [row["post"] - begin, row["received"] - begin], [place + 0.15] * 2, color=IN, lw=3
        )
    if "mixed" in row:
        axes.plot([row["mixed"] - begin], [place + 0.15], "D", color=MIX, markersize=4)
    if "gathered" in row:
        axes.plot([row["gathered"] - begin], [place], "o", color=MIX, markersize=4, mfc="white")


def main() -> int:
    """Profile; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--contenders", default="shift,shift-atc", metavar="A,B")
    parser.add_argument("--host", type=int, default=1)
    parser.add_argument("--step", type=int, default=4)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--save", default="profile_step", metavar="STEM")
    parser.add_argument("--name", default=NAME, help="prefix of the hosts' names")
    parser.add_argument("--network", type=int, default=NETWORK)
    parser.add_argument("--again", action="store_true", help="draw saved events once more")
    asked = parser.parse_args()
    bench = Bench(hosts=asked.hosts, rate=asked.rate, steps=asked.step + 3)
    RESULTS.mkdir(parents=True, exist_ok=True)
    names = asked.contenders.split(",")
    EVENTS.mkdir(parents=True, exist_ok=True)
    files = [EVENTS / f"{asked.save}-{name}.json" for name in names]
    if not asked.again:
        with Testbed(asked.hosts, asked.rate, name=asked.name, network=asked.network) as bed:
            for name, file in zip(names, files, strict=True):
                every = launch(bed, bench, CONTENDERS[name], ("--events", "--meter"))
                file.write_text(json.dumps(every))
    profiles = []
    for name, file in zip(names, files, strict=True):
        ranks = [r for r in json.loads(file.read_text()) if r["host"] == asked.host]
        profiles.append(Profile(CONTENDERS[name].title, ranks, asked.step))
    draw(profiles, RESULTS / f"{asked.save}.png")
    print(f"saved {RESULTS / asked.save}.png")
    return 0


if __name__ == "__main__":
    die_tidily()
    try:
        sys.exit(main())
    except TestbedError as error:
        sys.exit(f"profile_step: {error}")
