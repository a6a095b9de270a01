"""Crossover-SGD: every segment of the model meets a random peer of its own, fairly.

    for every segment s:  x_i[s] ← ½ x_i[s] + ½ x_{σ_s(i)}[s]        (after the local step: ATC)

σ_s is a random permutation of the nodes without fixed points, drawn anew for each segment and
each round, so each node sends and receives exactly one model's bytes, generally with different
peers. W_s = ½(I + P_s) is doubly stochastic: the mean over nodes is kept without extra weights.

| paper and code | here |
|---|---|
| group, root process | node; every local rank carries its share |
| chromosome ``fine`` | ``segments="blocks"`` |
| roulette, Algorithm 2 with its n−2 repair | ``peers="fair"`` |
| ``w/o fair peers`` | ``peers="unfair"`` |

Cost: M bytes and one message a segment, a node and a round (a k-th of that with ``stream=k``,
which the paper does not have). Expected contraction of the squared
consensus distance (n−2)/(2(n−1)) a round, for ``uniform`` and ``shift``.

Differs from the authors' code: peers come from a counter-based hash, not from a stream that a
skipped step would shift; sends and receives have buffers of their own; all segments are under
way at once, without barriers; every local rank steps, so nothing is broadcast afterwards.

Reference: Yeo, Bae, Jeong, Kwon, Oh, "Crossover-SGD: A gossip-based communication in distributed
deep learning for alleviating large mini-batch problem and enhancing scalability", 2020
(arXiv 2012.15198), Concurrency and Computation 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossip_hvd.errors import unknown
from gossip_hvd.methods.contract import Method, State
from gossip_hvd.methods.gossip import mixing_round, require_stream
from gossip_hvd.methods.registry import registered
from gossip_hvd.rounds import Round
from gossip_hvd.topology import Derangement, Fair, Shift, Topology, Unfair

PEERS: dict[str, Topology] = {
    "fair": Fair(),
    "uniform": Derangement(),
    "shift": Shift(),
    "unfair": Unfair(),
}


@registered
@dataclass(frozen=True)
class Crossover(Method):
    """Segment-wise gossip with random peers.

    Attributes:
        peers: ``"fair"`` (the authors' roulette), ``"uniform"`` (a uniform derangement),
            ``"shift"`` (a random circular shift: the same expected contraction, O(1) to plan) or
            ``"unfair"`` (a free draw with replacement, row-stochastic: the papers' ablation; the
            mean is then not kept).
        stream: 1 exchanges every segment in every round; k only every k-th, in turn.
    """

    name: ClassVar[str] = "crossover"

    peers: str = "fair"
    stream: int = 1

    @property
    def linear(self) -> bool:
        """See ``Method.linear``."""
        return True

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``; refuses unknown kinds of peers."""
        if self.peers not in PEERS:
            raise unknown("peers", self.peers, PEERS)
        require_stream(self, self.stream)
        return super().start(nodes, segments, seed)

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        return mixing_round(PEERS[self.peers], state, number, me, stream=self.stream)
