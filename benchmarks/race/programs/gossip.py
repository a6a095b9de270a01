"""gossip_hvd: gradients averaged over the host by Horovod, weights gossiped between hosts."""

import argparse
import json
from typing import Any

import torch

import gossip_hvd
import gossip_hvd.torch as hvd
from benchmarks.race.events import keep, kept
from benchmarks.race.model import Lane


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--options", type=json.loads, default={}, help="of DistributedOptimizer")
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--events", action="store_true", help="keep the recorder's events")


lane = Lane.parse(options)
hvd.init()
model = lane.model()
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=1e-3, momentum=lane.asked.momentum),
    named_parameters=model.named_parameters(),
    **lane.asked.options,
)
gossip: Any = optimizer.gossip  # type: ignore[attr-defined]
if lane.asked.events:
    keep(gossip)


def update() -> None:
    optimizer.step()
    optimizer.zero_grad()


lane.race(
    model,
    update,
    barrier=hvd.barrier,
    drain=gossip.drain,
    about={"gossip_hvd": gossip_hvd.__version__},
    extra=lambda: kept(gossip) if lane.asked.events else {},
)
hvd.shutdown()
