"""The methods, by name: one paper a file, one contract for all."""

from __future__ import annotations

from gossip_hvd.methods.adaptive_consensus import AdaptiveConsensus
from gossip_hvd.methods.allreduce import AllReduce
from gossip_hvd.methods.ceca import Ceca
from gossip_hvd.methods.contract import Method, State, restored
from gossip_hvd.methods.crossover import Crossover
from gossip_hvd.methods.decentlam import DecentLaM
from gossip_hvd.methods.global_averaging import GossipAGA, GossipPGA
from gossip_hvd.methods.gossip import Gossip
from gossip_hvd.methods.gossipgrad import GossipGraD
from gossip_hvd.methods.local_sgd import LocalSGD, PostLocalSGD
from gossip_hvd.methods.momentum import AveragedMomentum
from gossip_hvd.methods.over import Silent
from gossip_hvd.methods.push_sum import SGP
from gossip_hvd.methods.quasi_global import QuasiGlobal
from gossip_hvd.methods.registry import METHODS, method_of
from gossip_hvd.methods.schedule import Schedule
from gossip_hvd.methods.slowmo import SlowMo

__all__ = [
    "METHODS",
    "SGP",
    "AdaptiveConsensus",
    "AllReduce",
    "AveragedMomentum",
    "Ceca",
    "Crossover",
    "DecentLaM",
    "Gossip",
    "GossipAGA",
    "GossipGraD",
    "GossipPGA",
    "LocalSGD",
    "Method",
    "PostLocalSGD",
    "QuasiGlobal",
    "Schedule",
    "Silent",
    "SlowMo",
    "State",
    "method_of",
    "restored",
]
