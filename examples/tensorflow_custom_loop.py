"""Handwritten digits with a loop of one's own in TensorFlow, on as many ranks as you like.

    horovodrun -np 4 python examples/tensorflow_custom_loop.py --node-size 1
    horovodrun -np 4 python examples/tensorflow_custom_loop.py --node-size 2 --tape

The loop of Horovod's own TensorFlow 2 example. With ``--tape`` it is left as it was, with
DistributedGradientTape and a plain optimizer; otherwise DistributedOptimizer takes its place,
which mixes after the update.
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
import report
import tensorflow as tf
from keras_digits import BATCH, RATE, data, network

import gossip_hvd.tensorflow as hvd  # was: import horovod.tensorflow as hvd


def train(args: argparse.Namespace, seed: int) -> tuple[str, dict]:
    """Train once; returns the method's name and what came of it."""
    keras.utils.set_random_seed(seed)
    (images, labels), test_set = data(seed)
    batches = (
        tf.data.Dataset.from_tensor_slices((images, labels))
        .shuffle(len(images), seed=seed)
        .batch(BATCH)
    )
    model = network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = report.chosen(args, seed)
    optimizer = keras.optimizers.Adam(RATE)
    if not args.tape:
        optimizer = hvd.DistributedOptimizer(optimizer, **options)
    hvd.broadcast_variables(model.variables, root_rank=0)

    @tf.function
    def step(pictures: tf.Tensor, digits: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            value = loss(digits, model(pictures, training=True))
        if args.tape:
            tape = hvd.DistributedGradientTape(tape, **options)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return value

    training = report.Training(seed, args.epochs)
    for _ in training.epochs():
        for pictures, digits in batches:
            training.saw(float(step(pictures, digits)))

    gossip = hvd.gossip_of(model.trainable_variables)
    sent, distance = gossip.bytes_sent, gossip.consensus_distance()
    replicas = accuracy(model, test_set)
    hvd.average_variables(model.variables)
    return gossip.method.name, report.results(
        training,
        gossip,
        distance,
        sent,
        merged_accuracy=accuracy(model, test_set),
        replicas_accuracy=report.mean_over_ranks(replicas, "accuracy"),
    )


def accuracy(model: keras.Model, test_set: tuple[np.ndarray, np.ndarray]) -> float:
    """The fraction of a data set that the model names right."""
    images, labels = test_set
    return float(np.mean(np.argmax(model(images), 1) == labels))


def main() -> None:
    parser = report.options(__doc__.partition("\n")[0], epochs=10)
    parser.add_argument("--tape", action="store_true", help="DistributedGradientTape")
    args = parser.parse_args()
    hvd.init(horovod_scope=args.scope, node_size=args.node_size)
    runs = [train(args, seed) for seed in args.seed]
    report.finish(args, runs[0][0], [run for _, run in runs])
    hvd.shutdown()


if __name__ == "__main__":
    main()
