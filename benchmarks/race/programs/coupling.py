"""The node's all-reduce of 1 MB, alone and while a model's gossip is in flight."""

import argparse
import json
import time
from typing import Any

import horovod.torch as inside
import torch

import gossip_hvd.torch as hvd
from benchmarks.race.model import Lane

NBYTES = 1_000_000
EXCHANGES = 12


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--options", type=json.loads, default={}, help="of DistributedOptimizer")


lane = Lane.parse(options)
hvd.init()
torch.set_num_threads(1)
model = torch.nn.Linear(lane.asked.bytes // 4, 1, bias=False)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=1e-3),
    named_parameters=model.named_parameters(),
    **lane.asked.options,
)
gossip: Any = optimizer.gossip  # type: ignore[attr-defined]
values = torch.ones(NBYTES // 4)


def reduced() -> float:
    """Seconds of one all-reduce over the node."""
    begin = time.monotonic()
    inside.allreduce_(values, name="probe")
    return time.monotonic() - begin


def together(flag: bool) -> bool:
    """Whether every rank of the node says so: all of them take part, or none."""
    return bool(
        inside.allreduce(torch.tensor(float(flag)), name="flag", op=inside.Sum) == inside.size()
    )


idle = [reduced() for _ in range(200)]
busy: list[float] = []
transfers: list[float] = []
x = torch.ones(1, model.in_features)
share = 0.95 * lane.asked.bytes / lane.asked.ranks_per_host
for _ in range(EXCHANGES):
    gossip.drain()  # before backward: a round that its reduction owes would be drained too
    hvd.barrier()
    model(x).sum().backward()
    begin, before = time.monotonic(), gossip.bytes_sent
    optimizer.step()
    optimizer.zero_grad()
    while together(gossip.bytes_sent < before + share):
        busy += [reduced() for _ in range(5)]
        time.sleep(0.005)
    transfers.append(time.monotonic() - begin)
gossip.drain()
hvd.barrier()
lane.save({"idle": idle, "busy": busy, "transfers": transfers})
hvd.shutdown()
