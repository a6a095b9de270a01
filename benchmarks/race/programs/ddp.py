"""PyTorch's DistributedDataParallel over gloo, with or without a compressing hook."""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from benchmarks.race.model import Lane


def bf16(
    group: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's own hook, which DDP refuses by its name where there is no NCCL; gloo can do it."""
    return default_hooks.bf16_compress_hook(group, bucket)


HOOKS = {"bf16": bf16, "fp16": default_hooks.fp16_compress_hook}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hook", choices=HOOKS)


lane = Lane.parse(options)
dist.init_process_group("gloo", rank=lane.rank, world_size=lane.size)
model = torch.nn.parallel.DistributedDataParallel(lane.model())
if lane.asked.hook:
    model.register_comm_hook(None, HOOKS[lane.asked.hook])
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)


def update() -> None:
    optimizer.step()
    optimizer.zero_grad()


lane.race(model, update, barrier=dist.barrier)
dist.destroy_process_group()
