"""Decent-DP over gloo: it steps inside backward and gossips each bucket under the next pass."""

import argparse
import importlib.metadata
import os

import torch
import torch.distributed as dist

from benchmarks.race.model import Lane


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default="complete")


lane = Lane.parse(options)
os.environ["LOCAL_WORLD_SIZE"] = str(lane.asked.ranks_per_host)
from decent_dp.ddp import DecentralizedDataParallel  # noqa: E402
from loguru import logger  # noqa: E402

logger.remove()
dist.init_process_group("gloo", rank=lane.rank, world_size=lane.size)
model = DecentralizedDataParallel(
    lane.model(),
    lambda named: torch.optim.SGD([p for _, p in named], lr=1e-3),
    topology=lane.asked.topology,
)


def drain() -> None:
    for operation in model._comm_ops:
        if operation is not None:
            operation.wait()


lane.race(
    model,
    lambda: None,
    barrier=dist.barrier,
    drain=drain,
    about={"decent-dp": importlib.metadata.version("decent-dp")},
)
dist.destroy_process_group()
