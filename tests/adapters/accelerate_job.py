"""Accelerate on every rank: data shared and gathered, clipping, bfloat16, save and load."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections import UserDict

import torch
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

import gossip_hvd.torch as hvd
from gossip_hvd.errors import ConfigError
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


# What belongs to the samples of a loader, gathered: 70 of them do not share out evenly.


def everything(loader: object, key: str, as_objects: bool = False) -> list[object]:
    found = []
    for batch in loader:
        gathered = accelerator.gather_for_metrics(batch[key], as_objects)
        found += gathered.tolist() if isinstance(gathered, torch.Tensor) else gathered
    return found


samples = [{"number": i, "word": f"word {i}"} for i in range(70)]
numbers, words = list(range(70)), [sample["word"] for sample in samples]
in_order = accelerator.prepare(DataLoader(samples, 4))
assert everything(in_order, "number") == numbers
assert everything(in_order, "word") == words, "objects are gathered as such"
assert everything(in_order, "number", as_objects=True) == numbers
assert everything(in_order, "word", as_objects=True) == words
in_mappings = DataLoader(
    [{"number": i} for i in numbers], 4, collate_fn=lambda rows: UserDict(default_collate(rows))
)
found = [accelerator.gather_for_metrics(batch) for batch in accelerator.prepare(in_mappings)]
assert all(isinstance(one, UserDict) for one in found)
assert [i for one in found for i in one["number"].tolist()] == numbers
accelerator.dataloader_config.use_seedable_sampler = False
shuffled = accelerator.prepare(DataLoader(samples, 4, shuffle=True))
epochs = [everything(shuffled, "number") for _ in range(2)]
assert [sorted(epoch) for epoch in epochs] == [numbers] * 2, "shuffled alike on all ranks"
assert epochs[0] != epochs[1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"number": i} for i in range(64)])


streamed = everything(accelerator.prepare(DataLoader(Stream(), 4)), "number")
assert streamed == list(range(64)), "each rank keeps its share"
try:
    GossipAccelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
except ConfigError as error:
    assert "dispatch_batches" in str(error)
else:
    raise AssertionError("nobody hands out batches")
try:
    accelerator.gather({"number": torch.ones(1), "word": "w"})
except TypeError as error:
    assert "str" in str(error)
else:
    raise AssertionError("a word is no tensor")

# Lengths that differ between ranks.
ragged = {"a": torch.full((2, rank + 1), 7), "b": [torch.ones(rank + 1), torch.tensor(5)]}
behind = accelerator.pad_across_processes(ragged, dim=1, pad_index=-1)
assert behind["a"].tolist() == [[7] * (rank + 1) + [-1] * (size - rank - 1)] * 2
assert behind["b"][0].tolist() == [1.0] * (rank + 1), "it has no second dimension"
before = accelerator.pad_across_processes(ragged["a"], dim=-1, pad_first=True)
assert before.tolist() == [[0] * (size - rank - 1) + [7] * (rank + 1)] * 2
assert accelerator.gather(behind["a"]).shape == (2 * size, size)

# Who goes first.
for first, is_first in (
    (accelerator.main_process_first, accelerator.is_main_process),
    (accelerator.local_main_process_first, accelerator.is_local_main_process),
):
    with first():
        came = time.monotonic()
        if is_first:
            time.sleep(0.3)
        left = time.monotonic()
    times = hvd.allgather_object((came, left))
    assert all(other[0] >= times[0][1] for other in times[1:]), times
accelerator.end_training()
if rank == 0:
    print("all well")
