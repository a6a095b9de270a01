"""Several hosts on one machine: `python -m benchmarks.testbed up 4 --rate 200mbit`."""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.testbed import NAME, NETWORK, Testbed, TestbedError, refusal


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.testbed", description=__doc__)
    made.add_argument("--name", default=NAME, help="prefix of the hosts' names")
    made.add_argument("--network", type=int, default=NETWORK, help="addresses are 10.77.THIS.x")
    commands = made.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="make N hosts, in place of those that are there")
    up.add_argument("hosts", type=int, metavar="N")
    up.add_argument("--rate", help="of every link, in and out, such as 200mbit")
    commands.add_parser("down", help="end what runs on the hosts and remove them")
    commands.add_parser("status", help="list the hosts")
    run = commands.add_parser("run", help="run a command on a host that can reach all others")
    run.add_argument("--on", metavar="HOST", help="by default the first")
    run.add_argument("argv", nargs="+", metavar="CMD", help="after `--`")
    for name, what in (("cut", "take a host's link away"), ("mend", "give it back")):
        commands.add_parser(name, help=what).add_argument("host")
    rate = commands.add_parser("rate", help="make one host's link so fast")
    rate.add_argument("host")
    rate.add_argument("rate")
    return made


def main() -> int:
    """Do one command; returns the exit status."""
    asked = parser().parse_args()
    if reason := refusal():
        raise TestbedError(reason)
    hosts = asked.hosts if asked.command == "up" else None
    rate = asked.rate if asked.command == "up" else None
    bed = Testbed(hosts, rate, name=asked.name, network=asked.network)
    match asked.command:
        case "up":
            bed.up()
            print(" ".join(bed.hosts))
        case "down":
            bed.down()
        case "status":
            for row in bed.status():
                print(*(f"{key}={value}" for key, value in row.items()))
        case "run":
            command = bed.command(asked.argv, asked.on)
            os.execvpe(command[0], command, {**os.environ, **bed.environment()})
        case "cut":
            bed.cut(asked.host)
        case "mend":
            bed.mend(asked.host)
        case "rate":
            bed.rate(asked.host, asked.rate)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TestbedError as error:
        sys.exit(f"testbed: {error}")
