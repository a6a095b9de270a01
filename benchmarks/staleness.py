"""How far replicas are apart where rounds overlap: x ← x + f (W − I) x(s rounds ago) + e.

    python -m benchmarks.staleness [--nodes 8] [--rounds 3000]

The noise e has variance 1; a figure is the root of the mean square distance to the mean. Rounds are
late never, in three of ten steps, or always; *undamped* is the last with f = 1, which grows without
end for most graphs.
"""

from __future__ import annotations

import argparse

import numpy as np

from gossip_hvd.methods.crossover import PEERS
from gossip_hvd.staleness import damping
from gossip_hvd.topology import named

GRAPHS = {"crossover, fair": PEERS["fair"], "crossover, shift": PEERS["shift"]}
GRAPHS |= {name: named(name) for name in ("one_peer_exponential", "ring", "complete")}


def distance(
    graph: str, nodes: int, staleness: int, late: float, factor: float, rounds: int
) -> float:
    """The mean over the second half of the rounds."""
    draw, pending = np.random.default_rng(0), []
    x, found = np.zeros((nodes, 32)), []
    for k in range(rounds):
        x += draw.standard_normal(x.shape)
        pending.append((GRAPHS[graph].matrix(nodes, 0, k, 0) - np.eye(nodes), x.copy()))
        stay = staleness if draw.random() < late else 0
        while len(pending) > stay:
            change, snapshot = pending.pop(0)
            x += factor * change @ snapshot
        found.append(np.sqrt(np.mean((x - x.mean(axis=0)) ** 2)))
    return float(np.mean(found[rounds // 2 :]))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3000)
    asked = parser.parse_args()
    print(f"{asked.nodes} nodes{'':20}never late   3 of 10    always   undamped")
    for graph in GRAPHS:
        for staleness in (0, 1, 2, 3):
            size, f = (asked.nodes, staleness), damping(staleness)
            row = [distance(graph, *size, late, f, asked.rounds) for late in (0.0, 0.3, 1.0)]
            row.append(distance(graph, *size, 1.0, 1.0, min(asked.rounds, 300)))
            print(f"{graph:21} s = {staleness} " + "".join(f"{value:10.3g}" for value in row))


if __name__ == "__main__":
    main()
