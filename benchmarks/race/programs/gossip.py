"""gossip_hvd: gradients averaged over the host by Horovod, weights gossiped between hosts."""

import argparse
import json
from collections import deque
from typing import Any

import torch

import gossip_hvd
import gossip_hvd.torch as hvd
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
if lane.asked.events:  # all of them, not the last few thousand
    gossip.engine.seat.record.events = deque()


def update() -> None:
    optimizer.step()
    optimizer.zero_grad()


def events() -> dict[str, Any]:
    if not lane.asked.events:
        return {}
    seat = gossip.engine.seat
    return {
        "events": [tuple(event) for event in seat.record.events],
        "cells": [[cell.start, cell.stop, cell.unit] for cell in seat.grid("segments").cells],
    }


lane.race(
    model,
    update,
    barrier=hvd.barrier,
    drain=gossip.drain,
    about={"gossip_hvd": gossip_hvd.__version__},
    extra=events,
)
hvd.shutdown()
