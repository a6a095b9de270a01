"""Compute alone: every rank trains by itself, nothing is sent."""

import torch
from mpi4py import MPI

from benchmarks.race.model import Lane

lane = Lane.parse()
model = lane.model()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)


def update() -> None:
    optimizer.step()
    optimizer.zero_grad()


lane.race(model, update, barrier=MPI.COMM_WORLD.Barrier)
