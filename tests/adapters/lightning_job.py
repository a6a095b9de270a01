"""Lightning on every rank: fit, validate, checkpoint, resume, clip, accumulate, bfloat16."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings

import torch
from torch.utils.data import DataLoader, TensorDataset

import gossip_hvd.torch as hvd

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
hvd.init(node_size=int(sys.argv[1]))

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from gossip_hvd.torch.lightning import GossipStrategy  # noqa: E402


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(hvd.rank())
        self.layer = torch.nn.Linear(4, 2)
        self.seen = 0

    def training_step(self, batch, index):
        self.seen += 1
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, index):
        self.log("val", self.layer(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


data = TensorDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
train, test = DataLoader(data, 4, shuffle=True), DataLoader(data, 8)
folder = hvd.broadcast_object(tempfile.mkdtemp())


def trainer(epochs, **options):
    return pl.Trainer(
        strategy=GossipStrategy(method="crossover"),
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        default_root_dir=folder,
        **options,
    )


def same(values):
    return all(value == values[0] for value in hvd.allgather_object(values))


model = Model()
checkpoint = ModelCheckpoint(folder, save_last=True)
first = trainer(2, gradient_clip_val=0.5, accumulate_grad_batches=2, callbacks=[checkpoint])
first.fit(model, train, test)
optimizer = first.strategy.optimizers[0]
assert model.seen == 2 * 64 // 4 // hvd.size(), "each rank sees its share"
assert optimizer.gossip.round == model.seen // 2, "one round for two accumulated batches"
values = hvd.allgather_object(float(first.callback_metrics["val"]))
assert len(set(values)) == 1, "metrics are means over the world"
weights = hvd.allgather_object(model.layer.weight.tolist())
assert all(weight == weights[0] for weight in weights), "replicas are merged at the end"

again = Model()
second = trainer(3, precision="bf16-mixed")
second.fit(again, train, test, ckpt_path=os.path.join(folder, "last.ckpt"))
assert second.current_epoch == 3
assert again.seen == 64 // 4 // hvd.size(), "one epoch was left"
assert abs(second.strategy.optimizers[0].param_groups[0]["lr"] - 1e-4) < 1e-9, (
    "the schedule goes on"
)
second.validate(again, test, verbose=False)
if hvd.rank() == 0:
    print("all well")
