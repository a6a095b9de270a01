"""Handwritten digits with Keras, on as many ranks as you like.

    python examples/keras_digits.py                                     one process
    horovodrun -np 4 python examples/keras_digits.py --node-size 1      four nodes of one rank
    horovodrun -np 4 python examples/keras_digits.py --node-size 2      two nodes of two
    KERAS_BACKEND=torch horovodrun -np 4 python examples/keras_digits.py --node-size 1

An ordinary ``fit`` for Horovod, in which the import, the call of DistributedOptimizer and one
callback are all that mentions gossip. At its end the replicas are merged and the merged model is
tested.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import report
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gossip_hvd.keras as hvd  # was: import horovod.tensorflow.keras as hvd

BATCH = 16
RATE = 2e-3

Pictures = tuple[np.ndarray, np.ndarray]


def network() -> keras.Model:
    """A residual network for pictures of 8 × 8 grey pixels."""

    def block(x: Any, filters: int, name: str, strides: int = 1) -> Any:
        y = layers.Conv2D(filters, 3, strides, "same", name=f"{name}_conv1")(x)
        y = layers.ReLU()(layers.GroupNormalization(8, name=f"{name}_norm1")(y))
        y = layers.Conv2D(filters, 3, padding="same", name=f"{name}_conv2")(y)
        y = layers.GroupNormalization(8, name=f"{name}_norm2")(y)
        if x.shape[-1] != filters:
            x = layers.Conv2D(filters, 1, strides, name=f"{name}_short")(x)
        return layers.ReLU()(layers.Add()([x, y]))

    inputs = layers.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", name="stem")(inputs)
    x = block(x, 16, "block1")
    x = block(x, 32, "block2", 2)
    x = block(x, 64, "block3", 2)
    return keras.Model(inputs, layers.Dense(10, name="head")(layers.GlobalAveragePooling2D()(x)))


def data(seed: int) -> tuple[Pictures, Pictures]:
    """This rank's part of the training data, and all of the test data."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16 - 0.3
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    train = np.random.default_rng(seed).permutation(train)
    # Equally many whole batches on every rank.
    share = len(train) // hvd.size() // BATCH * BATCH
    mine = train[hvd.rank() * share : (hvd.rank() + 1) * share]
    return (images[mine], labels[mine]), (images[test], labels[test])


class Progress(keras.callbacks.Callback):
    """Tells ``report.Training`` of epochs and losses."""

    def __init__(self, training: report.Training) -> None:
        super().__init__()
        self._training, self._epochs = training, training.epochs()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        next(self._epochs)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._training.saw(logs["loss"])

    def on_train_end(self, logs: dict | None = None) -> None:
        next(self._epochs, None)


class Replicas(keras.callbacks.Callback):
    """Looks at the replicas before they are merged."""

    def __init__(self, test_set: Pictures) -> None:
        super().__init__()
        self._test_set = test_set

    def on_train_end(self, logs: dict | None = None) -> None:
        gossip = self.model.optimizer.gossip
        self.sent, self.rounds = gossip.bytes_sent, gossip.round
        self.distance = gossip.consensus_distance()
        self.accuracy = self.model.evaluate(*self._test_set, verbose=0)[1]


def train(args: Any, seed: int) -> tuple[str, dict]:
    """Train once; returns the method's name and what came of it."""
    keras.utils.set_random_seed(seed)
    train_set, test_set = data(seed)
    model = network()
    steps = args.epochs * len(train_set[0]) // BATCH
    schedule = keras.optimizers.schedules.CosineDecay(RATE, steps, alpha=0.01)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.Adam(schedule), **report.chosen(args, seed)
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])

    training = report.Training(seed, args.epochs)
    replicas = Replicas(test_set)
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        Progress(training),
        replicas,
        hvd.callbacks.GossipCallback(merge="end", distance=False),
    ]
    model.fit(*train_set, BATCH, epochs=args.epochs, verbose=0, callbacks=callbacks)

    merged = model.evaluate(*test_set, verbose=0)[1]
    return optimizer.gossip.method.name, report.results(
        training,
        optimizer.gossip,
        replicas.distance,
        replicas.sent,
        merged_accuracy=merged,
        replicas_accuracy=report.mean_over_ranks(replicas.accuracy, "accuracy"),
    )


def main() -> None:
    args = report.options(__doc__.partition("\n")[0], epochs=10).parse_args()
    hvd.init(horovod_scope=args.scope, node_size=args.node_size)
    runs = [train(args, seed) for seed in args.seed]
    report.finish(args, runs[0][0], [run for _, run in runs])
    hvd.shutdown()


if __name__ == "__main__":
    main()
