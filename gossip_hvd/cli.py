"""The command line: what is installed and set, who would meet whom, and why a job ended."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from gossip_hvd import __version__
from gossip_hvd.errors import GossipError
from gossip_hvd.methods import METHODS, method_of
from gossip_hvd.postmortem import as_json, as_text, examine
from gossip_hvd.settings import PREFIX, VARIABLES, refuse_unknown, setting
from gossip_hvd.transport import mpi

PACKAGES = ("horovod", "torch", "tensorflow-cpu", "tensorflow", "keras", "mpi4py", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gossip_hvd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, settings, and where each setting comes from")
    plan = commands.add_parser("plan", help="print who receives from whom, round by round")
    plan.add_argument("--method", default=None, help=f"one of {', '.join(sorted(METHODS))}")
    plan.add_argument("--nodes", type=int, default=4)
    plan.add_argument("--rounds", type=int, default=4)
    plan.add_argument("--segments", type=int, default=3)
    plan.add_argument("--seed", type=int, default=None)
    post = commands.add_parser("postmortem", help="say which rank stopped first, from its records")
    post.add_argument("folder", type=Path, metavar="DIR", help="what GOSSIP_HVD_RECORD_DIR named")
    post.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(arguments)
    try:
        if given.command == "postmortem":
            report = examine(given.folder)
            print(as_json(report) if given.json else as_text(report))
            return 0
        refuse_unknown()
        if given.command == "info":
            return info()
        method = setting("METHOD", given.method)
        seed = setting("SEED", given.seed)
        return show_plan(method, given.nodes, given.rounds, given.segments, seed)
    except GossipError as error:
        print(f"gossip_hvd: {error}", file=sys.stderr)
        return 2


def info() -> int:
    """Print versions and settings."""
    print(f"gossip_hvd {__version__}, Python {platform.python_version()}")
    for package in PACKAGES:
        try:
            print(f"  {package:16}{importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    set_before = {name: name in os.environ for name in mpi.TUNING}
    MPI = mpi.start()
    print(f"  {'MPI':16}{MPI.Get_library_version().splitlines()[0].rstrip(chr(0))}")
    print("settings (an argument in your script beats the environment)")
    for name, variable in VARIABLES.items():
        origin = "environment" if PREFIX + name in os.environ else "default"
        print(f"  {PREFIX + name:32}{setting(name)!s:14}{origin:14}{variable.meaning}")
    print("settings of Open MPI that init() makes where you have not")
    for name, value in mpi.TUNING.items():
        origin = "environment" if set_before[name] else "gossip_hvd"
        print(f"  {name:32}{os.environ.get(name, value):14}{origin}")
    return 0


def show_plan(name: str, nodes: int, rounds: int, segments: int, seed: int) -> int:
    """Print every node's sources, a line a round and segment."""
    method = method_of(name)
    state = method.start(nodes, segments, seed)
    print(f"{method}, {nodes} nodes, seed {seed}; node ← nodes it receives from (weight)")
    for number in range(rounds):
        plans = [method.plan(state, number, me) for me in range(nodes)]
        for stage in range(max((len(p.stages) for p in plans), default=0)):
            units = sorted({t.unit for p in plans for t in p.stages[stage].receives})
            for unit in units:
                meetings = (
                    f"{me} ← "
                    + ", ".join(
                        f"{t.peer} ({t.weight:g})"
                        for t in plan.stages[stage].receives
                        if t.unit == unit
                    )
                    for me, plan in enumerate(plans)
                    if any(t.unit == unit for t in plan.stages[stage].receives)
                )
                rule, grid = plans[0].stages[stage].rule, plans[0].stages[stage].grid
                print(f"round {number}  {rule} {grid} {unit}:  " + "   ".join(meetings))
    return 0
