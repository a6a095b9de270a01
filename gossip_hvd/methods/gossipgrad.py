"""GossipGraD: dissemination or hypercube partners that rotate, weights and momentum averaged.

    v_i ← ½ (v_i + v_j) ,  x_i ← ½ (x_i + x_j)        j the partner of round k

    dissemination:  receive from r + 2^i, send to r − 2^i (mod n),  i = k mod ⌈log2 n⌉
    hypercube:      exchange with r XOR 2^i
    rotation:       after each sweep of ⌈log2 n⌉ rounds another of n shuffled orders of the nodes

| paper, authors' code (matex-org caffe) | here |
|---|---|
| diffuse, cube | ``partners="dissemination"``, ``"hypercube"`` |
| p communicators of shuffled ranks (GPU9, CPU12) | ``rotate=True`` |
| tag 1234, parameters; tag 2345, history | slots ``"weights"``; ``"momentum"``, ``"variance"`` |
| post at on_begin, complete at the next on_begin | ``timing="awc"`` |

Cost: M bytes a node and a round for each slot: 2M with SGD's momentum, 3M with Adam.

Differs from the authors' code: any number of nodes (there powers of two; in a hypercube a node
whose partner does not exist rests). Late exchanges are merged in difference form from a copy;
there the buffer under way is the live one, and ½x + ½x_recv of an older x halves the step. Orders
come from a counter-based hash. A variance merged late is kept from falling below zero.

The abstract speaks of gradients: ``payload="gradients"`` averages them with the partner before
the local step, as torchdistx does. Nothing then pulls the weights together: each node sums other
mixtures of gradients, and the replicas drift apart. It is offered to show just that.

Reference: Daily, Vishnu, Siegel, Warfel, Amatya, "GossipGraD: Scalable deep learning using gossip
communication based asynchronous gradient descent", 2018 (arXiv 1803.05880).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossip_hvd.errors import unknown
from gossip_hvd.methods.contract import Method, Moment, State
from gossip_hvd.methods.gossip import checked, mixing_round
from gossip_hvd.methods.momentum import History
from gossip_hvd.methods.registry import registered
from gossip_hvd.rounds import GRADIENTS, WEIGHTS, Round
from gossip_hvd.topology import Dissemination, Hypercube, Rotated, Topology

PARTNERS = {"dissemination": Dissemination(), "hypercube": Hypercube(skip=True)}
PAYLOADS = ("weights+momentum", "weights", "gradients")


@registered
@dataclass(frozen=True)
class GossipGraD(History, Method):
    """One partner a round, rotating.

    Attributes:
        partners: ``"dissemination"`` or ``"hypercube"``.
        rotate: whether every sweep has another order of the nodes.
        payload: ``"weights+momentum"`` (the authors' code), ``"weights"``, or ``"gradients"``
            (the abstract; replicas drift).
    """

    name: ClassVar[str] = "gossipgrad"

    partners: str = "dissemination"
    rotate: bool = True
    payload: str = "weights+momentum"

    @property
    def topology(self) -> Topology:
        """The partners of every round."""
        inner = PARTNERS[self.partners]
        return Rotated(inner) if self.rotate else inner

    @property
    def timings(self) -> tuple[str, ...]:
        """Averaged gradients are needed at once."""
        return ("atc",) if self.payload == "gradients" else ("atc", "awc")

    @property
    def writes(self) -> tuple[str, ...]:
        """What is exchanged."""
        if self.payload == "weights+momentum":
            return (WEIGHTS, *self.history)
        return (WEIGHTS,) if self.payload == "weights" else (GRADIENTS,)

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Those whose history is known, where it is exchanged."""
        return super().optimizers if self.payload == "weights+momentum" else ()

    def when(self, number: int) -> Moment:
        """Gradients before the local step, weights after it."""
        return "reduction" if self.payload == "gradients" else "step"

    @property
    def linear(self) -> bool:
        """See ``Method.linear``."""
        return True

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``."""
        if self.partners not in PARTNERS:
            raise unknown("partners", self.partners, PARTNERS)
        if self.payload not in PAYLOADS:
            raise unknown("payload", self.payload, PAYLOADS)
        if nodes > 1:
            checked(self.topology, nodes, seed)
        return super().start(nodes, segments, seed)

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        return mixing_round(self.topology, state, number, me, self.writes)
