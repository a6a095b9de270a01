"""Accelerate on every rank: data shared, accumulation, clipping, bfloat16, save and load."""

from __future__ import annotations

import sys
import tempfile
import warnings

import torch
from torch.utils.data import DataLoader, TensorDataset

import gossip_hvd.torch as hvd
from gossip_hvd.torch.accelerate import GossipAccelerator

warnings.simplefilter("ignore")
accelerator = GossipAccelerator(
    node_size=int(sys.argv[1]),
    gossip={"method": "crossover"},
    gradient_accumulation_steps=2,
    mixed_precision="bf16",
    cpu=True,
)
size, rank = hvd.size(), hvd.rank()
assert (accelerator.num_processes, accelerator.process_index) == (size, rank)
assert accelerator.is_main_process == (rank == 0)
torch.manual_seed(rank)
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
data = TensorDataset(torch.arange(64.0).view(-1, 1).repeat(1, 4) / 64)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
model, optimizer, loader, schedule = accelerator.prepare(
    model, optimizer, DataLoader(data, 4, shuffle=True), schedule
)
seen, steps = [], 0
for (x,) in loader:
    with accelerator.accumulate(model):
        loss = model(x).square().mean()
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    steps += 1
    seen += accelerator.gather_for_metrics(x[:, 0]).tolist()
assert sorted(round(value * 64) for value in seen) == list(range(64)), "each sample once"
assert steps == 64 // 4 // size
assert optimizer.optimizer.gossip.round == steps // 2
folder = hvd.broadcast_object(tempfile.mkdtemp())
accelerator.save_state(folder)
accelerator.wait_for_everyone()
accelerator.load_state(folder)
weights = hvd.allgather_object(model.weight.tolist())
assert all(weight == weights[0] for weight in weights)
mean = accelerator.reduce(torch.tensor(float(rank)), "mean").item()
assert mean == (size - 1) / 2
accelerator.end_training()
if rank == 0:
    print("all well")
