"""Gossip SGD over a fixed or one-peer graph (D-PSGD and its one-peer form).

    ATC   y_i = x_i − γ d_i ;  x_i ← Σ_j W_ij y_j
    AWC   x_i ← Σ_j W_ij x_j − γ d_i(x_i)

| paper | here |
|---|---|
| W^(k) | ``topology``; its row and column of this node in round k |
| x_i | the node's weights, slot ``"weights"`` |

Cost: M bytes and one message a segment, a node and a round, for one-peer graphs.

Differs from the papers: the one-peer exponential graph is exact after log2 n rounds only where n
is a power of two; any n is allowed and contracts. Momentum stays local.

References: Lian et al., "Can decentralized algorithms outperform centralized algorithms?",
NeurIPS 2017 (D-PSGD); Ying et al., "Exponential graph is provably efficient for decentralized
deep training", NeurIPS 2021 (one-peer exponential).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossip_hvd.errors import unknown
from gossip_hvd.methods.contract import Method, State
from gossip_hvd.rounds import WEIGHTS, Round, Stage, Transfer
from gossip_hvd.topology import TOPOLOGIES, Topology


def topology_of(named: str | Topology) -> Topology:
    """The topology itself, or the one of that name with its default options.

    Raises:
        ConfigError: for a name that does not exist, with the nearest that does.
    """
    if isinstance(named, Topology):
        return named
    kind = TOPOLOGIES.get(named.replace("-", "_"))
    if kind is None:
        raise unknown("topology", named, TOPOLOGIES)
    return kind()


def mixing_round(
    topology: Topology, state: State, number: int, me: int, slots: tuple[str, ...] = (WEIGHTS,)
) -> Round:
    """One stage in which every segment meets the peers that ``topology`` gives it."""
    meetings = topology.plan(me, state.nodes, state.seed, number, state.segments)
    receives = tuple(
        Transfer(peer, unit, weight, slot)
        for slot in slots
        for unit, meeting in enumerate(meetings)
        for peer, weight in meeting.receives
    )
    sends = tuple(
        Transfer(peer, unit, weight, slot)
        for slot in slots
        for unit, meeting in enumerate(meetings)
        for peer, weight in meeting.sends
    )
    return Round(number, (Stage(sends, receives),) if sends or receives else ())


@dataclass(frozen=True)
class Gossip(Method):
    """X ← W X with the matrix of one topology.

    Attributes:
        topology: a name, such as ``"one_peer_exponential"`` or ``"ring"``, or a topology object
            with options of its own.
    """

    name: ClassVar[str] = "gossip"

    topology: str | Topology = "one_peer_exponential"

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``; refuses a topology that does not exist for this many nodes."""
        topology_of(self.topology).require(nodes)
        return super().start(nodes, segments, seed)

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        return mixing_round(topology_of(self.topology), state, number, me)
