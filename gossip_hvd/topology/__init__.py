"""Who meets whom: topologies as pure functions of (participants, seed, round, segment)."""

from __future__ import annotations

from typing import Any

from gossip_hvd.errors import ConfigError, unknown
from gossip_hvd.topology.base_graph import BaseGraph, SimpleBaseGraph
from gossip_hvd.topology.ceca import Ceca, TwoCopyMeeting
from gossip_hvd.topology.contract import ALONE, Edges, Meeting, Stochastic, Topology
from gossip_hvd.topology.crossover import Derangement, Fair, RandomPush, Shift, Unfair
from gossip_hvd.topology.custom import Custom
from gossip_hvd.topology.equitopo import ODEquiDyn, OUEquiDyn
from gossip_hvd.topology.exponential import (
    DirectedExponential,
    Hypercube,
    KPeerExponential,
    OnePeerExponential,
)
from gossip_hvd.topology.fixed import Complete, Grid, Ring, StaticExponential, Torus
from gossip_hvd.topology.gossipgrad import Dissemination, Rotated
from gossip_hvd.topology.pairs import BipartiteExponential, OnePeerRing, RandomMatching

TOPOLOGIES: dict[str, type[Topology]] = {
    "fair": Fair,
    "derangement": Derangement,
    "shift": Shift,
    "unfair": Unfair,
    "random_push": RandomPush,
    "ring": Ring,
    "torus": Torus,
    "grid": Grid,
    "complete": Complete,
    "static_exponential": StaticExponential,
    "one_peer_exponential": OnePeerExponential,
    "k_peer_exponential": KPeerExponential,
    "directed_exponential": DirectedExponential,
    "hypercube": Hypercube,
    "one_peer_ring": OnePeerRing,
    "random_matching": RandomMatching,
    "bipartite_exponential": BipartiteExponential,
    "od_equidyn": ODEquiDyn,
    "ou_equidyn": OUEquiDyn,
    "dissemination": Dissemination,
    "rotated": Rotated,
    "base_graph": BaseGraph,
    "simple_base_graph": SimpleBaseGraph,
}
"""All topologies that a name can make, each with its default options."""


def named(name: str, **options: Any) -> Topology:
    """The topology of this name; `one-peer-ring` means `one_peer_ring`.

    Raises:
        ConfigError: no such name, or no such option.
    """
    found = TOPOLOGIES.get(name.replace("-", "_"))
    if found is None:
        raise unknown("topology", name, TOPOLOGIES)
    try:
        return found(**options)
    except TypeError as error:
        raise ConfigError(f"topology {name!r}: {error}") from None


__all__ = [
    "ALONE",
    "TOPOLOGIES",
    "BaseGraph",
    "BipartiteExponential",
    "Ceca",
    "Complete",
    "Custom",
    "Derangement",
    "DirectedExponential",
    "Dissemination",
    "Edges",
    "Fair",
    "Grid",
    "Hypercube",
    "KPeerExponential",
    "Meeting",
    "ODEquiDyn",
    "OUEquiDyn",
    "OnePeerExponential",
    "OnePeerRing",
    "RandomMatching",
    "RandomPush",
    "Ring",
    "Rotated",
    "Shift",
    "SimpleBaseGraph",
    "StaticExponential",
    "Stochastic",
    "Topology",
    "Torus",
    "TwoCopyMeeting",
    "Unfair",
    "named",
]
