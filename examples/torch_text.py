"""A small transformer reads the source of Python's own library, byte by byte.

    python examples/torch_text.py                                       one process
    horovodrun -np 4 python examples/torch_text.py --node-size 1        four nodes of one rank
    horovodrun -np 4 python examples/torch_text.py --node-size 2        two nodes of two

The text is the source of Python's standard library, which is there wherever Python is; every
tenth file is kept for the test. The loss is in bits per byte: eight would be pure guessing.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import report
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gossip_hvd.torch as hvd  # was: import horovod.torch as hvd

BATCH = 8
CONTEXT = 128
RATE = 5e-3
WIDTH = 96
HEADS = 4
LAYERS = 3
TEST_KILOBYTES = 64


class Block(nn.Module):
    """Attention to earlier bytes, then a layer for each byte alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.think = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.attend(self.norm1(x)).view(batch, length, 3, HEADS, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.think(self.norm2(x))


class Transformer(nn.Module):
    """Guesses every next byte from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.byte(text) + self.place(torch.arange(text.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def data(kilobytes: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test text in windows of CONTEXT + 1 bytes; the same on every rank."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("*.py"), key=lambda file: file.name)
    test = files[::10]
    train = [file for file in files if file not in test]
    return windows(train, 1024 * kilobytes), windows(test, 1024 * TEST_KILOBYTES)


def windows(files: list[Path], most: int) -> TensorDataset:
    """The first bytes of some files, an equal part of each, cut into windows."""
    part = math.ceil(most / len(files))
    text = b"".join(file.read_bytes()[:part] for file in files)
    count = min(most, len(text)) // (CONTEXT + 1)
    chosen = bytearray(text[: count * (CONTEXT + 1)])
    return TensorDataset(torch.frombuffer(chosen, dtype=torch.uint8).view(count, -1))


def bits_per_byte(model: nn.Module, window: Tensor) -> Tensor:
    """What it would cost to write down the next bytes with the model's help."""
    window = window.long()
    guesses = model(window[:, :-1])
    return functional.cross_entropy(guesses.flatten(0, 1), window[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def test(model: nn.Module, dataset: TensorDataset) -> float:
    """Mean bits per byte of text that was not trained on."""
    parts = dataset.tensors[0].split(64)
    total = sum(float(bits_per_byte(model, part)) * len(part) for part in parts)
    return total / len(dataset)


def train(args, seed: int, train_set: TensorDataset, test_set: TensorDataset) -> tuple[str, dict]:
    """Train once; returns the method's name and what came of it."""
    torch.manual_seed(seed)
    sampler = DistributedSampler(train_set, hvd.size(), hvd.rank(), seed=seed)
    loader = DataLoader(train_set, BATCH, sampler=sampler, drop_last=True)

    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
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
        for (window,) in loader:
            optimizer.zero_grad()
            loss = bits_per_byte(model, window)
            (loss * math.log(2)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            training.saw(loss.item())

    # Every replica on its own, then all of them merged into one.
    gossip = optimizer.gossip
    gossip.drain()
    sent = gossip.bytes_sent
    distance = gossip.consensus_distance()
    replicas = report.mean_over_ranks(test(model, test_set), "bits_per_byte")
    hvd.average_parameters(model)
    merged = test(model, test_set)
    quality = {"merged_bits_per_byte": merged, "replicas_bits_per_byte": replicas}
    return gossip.method.name, report.results(training, gossip, distance, sent, **quality)


def main() -> None:
    parser = report.options(__doc__.partition("\n")[0], epochs=4)
    parser.add_argument("--kilobytes", type=int, default=512, help="text to train with (512)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init(horovod_scope=args.scope, node_size=args.node_size)
    train_set, test_set = data(args.kilobytes)
    runs = [train(args, seed, train_set, test_set) for seed in args.seed]
    report.finish(args, runs[0][0], [run for _, run in runs])
    hvd.shutdown()


if __name__ == "__main__":
    main()
