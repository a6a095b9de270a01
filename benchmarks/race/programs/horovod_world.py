"""Horovod: one all-reduce over all ranks."""

import argparse

import horovod
import horovod.torch as hvd
import torch
from mpi4py import MPI

from benchmarks.race.model import Lane


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compression", choices=["none", "fp16"], default="none")


lane = Lane.parse(options)
hvd.init()
model = lane.model()
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=1e-3),
    named_parameters=model.named_parameters(),
    compression=getattr(hvd.Compression, lane.asked.compression),
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)


def update() -> None:
    optimizer.step()
    optimizer.zero_grad()


lane.race(
    model,
    update,
    barrier=MPI.COMM_WORLD.Barrier,
    about={"horovod": horovod.__version__, "MPI": MPI.Get_library_version().split(",")[0]},
)
