"""Handwritten digits with a small residual network, on as many ranks as you like.

    python examples/torch_digits.py                                     one process
    horovodrun -np 4 python examples/torch_digits.py --node-size 1      four nodes of one rank
    horovodrun -np 4 python examples/torch_digits.py --node-size 2      two nodes of two

An ordinary loop for Horovod, in which the import and the call of DistributedOptimizer are all
that mentions gossip. At its end the replicas are merged and the merged model is tested.
"""

from __future__ import annotations

import report
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gossip_hvd.torch as hvd  # was: import horovod.torch as hvd

BATCH = 16
RATE = 0.05


class Block(nn.Module):
    """Two convolutions around which the input finds a short way."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.short(x))


class Net(nn.Module):
    """A residual network for pictures of 8 × 8 grey pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


def data() -> tuple[TensorDataset, TensorDataset]:
    """Three quarters to train with, a quarter to test with; the same on every rank."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    labels = torch.tensor(labels)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """The fraction of a data set that the model names right."""
    model.eval()
    images, labels = dataset.tensors
    right = (model(images).argmax(1) == labels).float().mean()
    model.train()
    return float(right)


def train(args, seed: int, train_set: TensorDataset, test_set: TensorDataset) -> tuple[str, dict]:
    """Train once; returns the method's name and what came of it."""
    torch.manual_seed(seed)
    sampler = DistributedSampler(train_set, hvd.size(), hvd.rank(), seed=seed)
    loader = DataLoader(train_set, BATCH, sampler=sampler, drop_last=True)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # up from RATE / 25 and down to it again
        optimizer, RATE, args.epochs * len(loader), cycle_momentum=False, final_div_factor=1
    )
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), **report.chosen(args, seed)
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    training = report.Training(seed, args.epochs)
    for epoch in training.epochs():
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            training.saw(loss.item())

    # Every replica on its own, then all of them merged into one.
    gossip = optimizer.gossip
    gossip.drain()
    sent = gossip.bytes_sent
    distance = gossip.consensus_distance()
    replicas = report.mean_over_ranks(accuracy(model, test_set), "accuracy")
    hvd.average_parameters(model)
    # Batch norm's statistics are no weights: they are measured anew for the merged model. Where
    # four replicas had not met for three epochs, it was right in 81 % of cases with the mean of
    # the replicas' statistics and in 95 % with these.
    hvd.recalibrate_batch_norm(model, loader)
    merged = accuracy(model, test_set)
    quality = {"merged_accuracy": merged, "replicas_accuracy": replicas}
    return gossip.method.name, report.results(training, gossip, distance, sent, **quality)


def main() -> None:
    args = report.options(__doc__.partition("\n")[0], epochs=10).parse_args()
    torch.set_num_threads(1)
    hvd.init(horovod_scope=args.scope, node_size=args.node_size)
    train_set, test_set = data()
    runs = [train(args, seed, train_set, test_set) for seed in args.seed]
    report.finish(args, runs[0][0], [run for _, run in runs])
    hvd.shutdown()


if __name__ == "__main__":
    main()
