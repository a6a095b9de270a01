"""How much slower rounds must mix that may be posted before the last ones have been merged.

A node whose peer is late posts the next round all the same. What it sends then lacks the merges
that are still to come, so the distance y of the nodes, along an eigenvector of W with eigenvalue
1 − a, follows

    y_{k+1} = y_k − a y_{k−s} ,     which shrinks only for real a with  0 < a < 2 sin(π / (4s + 2))

(Levin and May, "A note on difference-delay equations", Theor. Popul. Biol. 9, 1976). With s = 1
that is a < 1: half and half between two nodes never settles, a ring diverges. So every round mixes
with (1 − f) I + f W, where f is small enough for any W with weights of its own of a third or more.
"""

from __future__ import annotations

LONGEST = 6
"""Rounds behind the newest that may still be under way; tags repeat after eight."""


def damping(staleness: int) -> float:
    """f = 1 / (s + 1), rounded down to a power of two, so that it rounds no weight."""
    return 0.5 ** staleness.bit_length()
