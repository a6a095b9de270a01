"""Gossip SGD over any graph: D-PSGD, its one-peer form, several peers, a schedule of peers.

    ATC   y_i = x_i − γ d_i ;  x_i ← Σ_j W_ij y_j
    AWC   x_i ← Σ_j W_ij x_j − γ d_i(x_i)

| paper | here |
|---|---|
| W^(k) | ``topology``; its row and column of this node in round k |
| x_i | the node's weights, slot ``"weights"`` |

Cost: M bytes and one message a segment and a peer, a node and a round.

Differs from the papers: the one-peer exponential graph is exact after log2 n rounds only where n
is a power of two; any n is allowed and contracts. Momentum stays local. The number of peers may
change with the round (``peers``), and segments may take turns (``stream``).

References: Lian et al., "Can decentralized algorithms outperform centralized algorithms?",
NeurIPS 2017 (D-PSGD); Ying et al., "Exponential graph is provably efficient for decentralized
deep training", NeurIPS 2021 (one-peer exponential).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import ClassVar

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods.contract import Method, State
from gossip_hvd.methods.registry import registered
from gossip_hvd.rounds import WEIGHTS, Round, Stage, Transfer
from gossip_hvd.topology import (
    TOPOLOGIES,
    KPeerExponential,
    OnePeerExponential,
    Topology,
    named,
)

LOOKED_AT = 2048
"""Nodes times rounds that ``checked`` looks at; more would delay the start of large jobs."""


def topology_of(given: str | Topology) -> Topology:
    """The topology itself, or the one of that name with its default options.

    Raises:
        ConfigError: for a name that does not exist, with the nearest that does.
    """
    return given if isinstance(given, Topology) else named(given)


def checked(topology: Topology, nodes: int, seed: int) -> None:
    """Look at a few rounds of a topology: every sum of W that it declares must be one.

    Raises:
        ConfigError: names the round, and the row or column.
    """
    topology.require(nodes)
    rounds = min(topology.period(nodes) or 4, max(1, LOOKED_AT // nodes))
    topology.check(nodes, seed, rounds)


def with_peers(topology: Topology, k: int) -> Topology:
    """The topology with ``k`` peers a round.

    Raises:
        ConfigError: where its graph has no such variant.
    """
    if isinstance(topology, OnePeerExponential):
        return topology if k == 1 else KPeerExponential(k, topology.stagger)
    if any(f.name == "k" for f in fields(topology)):  # type: ignore[arg-type]
        return replace(topology, k=k)  # type: ignore[type-var]
    able = ["one_peer_exponential"]
    able += [
        n for n, kind in TOPOLOGIES.items() if "k" in getattr(kind, "__dataclass_fields__", ())
    ]
    raise ConfigError(
        f"peers={k}: {topology} has no variant with so many peers a round; these have: "
        f"{', '.join(able)}."
    )


def mixing_round(
    topology: Topology,
    state: State,
    number: int,
    me: int,
    slots: tuple[str, ...] = (WEIGHTS,),
    stream: int = 1,
    shared: bool = False,
) -> Round:
    """One stage in which segments meet the peers that ``topology`` gives them.

    With ``stream=k`` segment s takes part in rounds s, s + k, s + 2k, …, and these are rounds
    0, 1, 2, … of its topology, so that no segment misses a part of a cyclic schedule. With
    ``shared`` all segments meet the peers of segment 0.
    """
    units = range(number % stream, state.segments, stream)
    place, nodes, seed = number // stream, state.nodes, state.seed
    if topology.period(nodes) == 1:
        stage = _lasting_stage(topology, me, nodes, seed, 0, units, slots, shared)
    else:
        stage = _stage(topology, me, nodes, seed, place, units, slots, shared)
    return Round(number, (stage,) if stage.sends or stage.receives else ())


def _stage(
    topology: Topology,
    me: int,
    nodes: int,
    seed: int,
    place: int,
    units: range,
    slots: tuple[str, ...],
    shared: bool,
) -> Stage:
    """Node ``me``'s row and column in round ``place`` of the topology, as transfers."""
    asked = range(1) if shared else units
    meetings = topology.plan(me, nodes, seed, place, asked) * (len(units) if shared else 1)
    pairs = [(slot, *pair) for slot in slots for pair in zip(units, meetings, strict=True)]
    return Stage(
        tuple(Transfer(j, unit, w, slot) for slot, unit, met in pairs for j, w in met.sends),
        tuple(Transfer(j, unit, w, slot) for slot, unit, met in pairs for j, w in met.receives),
    )


# A graph that never changes may have very many peers: one stage serves all its rounds.
_lasting_stage = lru_cache(maxsize=16)(_stage)


def require_stream(method: Method, stream: int) -> None:
    """Refuse a stream that is no number of turns."""
    if stream < 1:
        raise ConfigError(f"{method}: stream={stream}, expected 1 (every segment) or more turns.")


@dataclass(frozen=True)
class OverGraph(Method):
    """What all methods over a graph share: the graph, and how many peers it gives in which round.

    Attributes:
        topology: a name, such as ``"one_peer_exponential"`` or ``"ring"``, or a topology object
            with options of its own.
        peers: how many peers a round, for graphs that have such variants: a number, or numbers
            by the round from which they count, ``{0: 2, 1000: 1}``. None leaves the graph as it
            is.
    """

    topology: str | Topology = "one_peer_exponential"
    peers: int | Mapping[int, int] | None = None

    allowed: ClassVar[tuple[str, ...]] = ("doubly",)

    def topology_at(self, number: int) -> Topology:
        """The graph of round ``number``."""
        given = topology_of(self.topology)
        if self.peers is None:
            return given
        if isinstance(self.peers, int):
            return with_peers(given, self.peers)
        return with_peers(given, self.peers[max(start for start in self.peers if start <= number)])

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``; looks at a few rounds of every graph that will be used."""
        if isinstance(self.peers, Mapping) and 0 not in self.peers:
            raise ConfigError(f"peers={self.peers}: say how many from round 0 on.")
        starts = self.peers if isinstance(self.peers, Mapping) else (0,)
        for number in starts:
            topology = self.topology_at(number)
            if topology.stochastic not in self.allowed:
                raise ConfigError(
                    f"method {self.name!r} cannot use {topology}, which is "
                    f"{topology.stochastic}-stochastic and would not keep the mean: column-"
                    "stochastic graphs need method 'sgp', and method 'crossover' has the "
                    "row-stochastic ablation peers='unfair'."
                )
            if nodes > 1:
                checked(topology, nodes, seed)
        return super().start(nodes, segments, seed)


@registered
@dataclass(frozen=True)
class Gossip(OverGraph):
    """X ← W X with the matrix of one topology.

    Attributes:
        stream: 1 exchanges every segment in every round; k only every k-th, in turn.
    """

    name: ClassVar[str] = "gossip"

    stream: int = 1

    @property
    def linear(self) -> bool:
        """See ``Method.linear``."""
        return True

    def start(self, nodes: int, segments: int, seed: int) -> State:
        """See ``Method.start``."""
        require_stream(self, self.stream)
        return super().start(nodes, segments, seed)

    def plan(self, state: State, number: int, me: int) -> Round:
        """See ``Method.plan``."""
        return mixing_round(self.topology_at(number), state, number, me, stream=self.stream)
