"""The same module, gossiping; start it with horovodrun or mpirun."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from gossip_hvd.torch.lightning import GossipStrategy


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        )

    def training_step(self, batch, index):
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        accuracy = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, sync_dist=True, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main():
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train = DataLoader(torch.utils.data.Subset(data, range(1500)), batch_size=32, shuffle=True)
    test = DataLoader(torch.utils.data.Subset(data, range(1500, len(data))), batch_size=256)
    trainer = pl.Trainer(
        strategy=GossipStrategy(method="crossover"),
        accelerator="cpu",
        devices=1,
        max_epochs=5,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(Digits(), train, test)
    if trainer.is_global_zero:
        print(f"accuracy {100 * trainer.callback_metrics['accuracy']:.1f} %")


if __name__ == "__main__":
    main()
