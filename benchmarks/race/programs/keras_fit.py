"""gossip_hvd under Keras's ``fit`` on TensorFlow: the same model, in a compiled graph."""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import gossip_hvd
import gossip_hvd.tensorflow.keras as hvd  # before Lane, which loads PyTorch
from benchmarks.race.events import keep, kept
from benchmarks.race.model import LAYERS, Lane


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--options", type=json.loads, default={}, help="of DistributedOptimizer")
    parser.add_argument("--events", action="store_true", help="keep the recorder's events")


def asleep(seconds: float, x: Any) -> Any:
    """The same tensor, after a while."""

    def sleep(values: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return values

    return tf.ensure_shape(tf.numpy_function(sleep, [x], x.dtype), x.shape)


class SleepyLayer(keras.layers.Layer):
    """Sleeps where a layer would compute; the weight's gradient is a constant."""

    def __init__(self, size: int, forward: float, backward: float) -> None:
        super().__init__()
        self._size, self._seconds = size, (forward, backward)

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(self._size,), initializer="zeros", name="kernel")

    def call(self, x: Any) -> Any:
        forward, backward = self._seconds

        @tf.custom_gradient
        def work(x: Any, weight: Any) -> Any:
            def gradient(upstream: Any) -> Any:
                upstream = asleep(backward, upstream)
                with tf.control_dependencies([upstream]):
                    return upstream, tf.fill(weight.shape, 1e-3)

            return asleep(forward, x), gradient

        return work(x, tf.convert_to_tensor(self.kernel))


class Marks(keras.callbacks.Callback):
    """Notes when steps begin and end; ``fit`` does not say where backward begins."""

    def __init__(self, steps: Sequence[int]) -> None:
        super().__init__()
        self._steps = iter(steps)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin = time.monotonic()
        if late := lane.late(next(self._steps)):
            time.sleep(late)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.monotonic()
        lane.marks.append((self._begin, self._begin, now, now))


lane = Lane.parse(options)
hvd.init()
size, share = lane.asked.bytes // 4 // LAYERS, lane.asked.compute / LAYERS
layers = [SleepyLayer(size, share / 3, share * 2 / 3) for _ in range(LAYERS)]
model = keras.Sequential([keras.layers.Input((1,)), *layers])
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1e-3), **lane.asked.options)
model.compile(optimizer=optimizer, loss=lambda wanted, found: tf.reduce_mean(found))
zeros = tf.data.Dataset.from_tensors((tf.zeros([1, 1]), tf.zeros([1, 1]))).repeat()
# The tuner of tf.data wakes up once in 20 s by now, and the end of `fit` waits for it.
calm = tf.data.Options()
calm.autotune.enabled = False
zeros = zeros.with_options(calm)


def train(steps: Sequence[int]) -> None:
    model.fit(zeros, steps_per_epoch=len(steps), callbacks=[Marks(steps)], verbose=0)


def drain() -> None:
    if optimizer.gossip.begun:
        optimizer.gossip.drain()
        if lane.asked.events and not lane.marks[lane.asked.warm_up :]:
            keep(optimizer.gossip)


lane.time(
    train,
    barrier=hvd.barrier,
    drain=drain,
    about={
        "gossip_hvd": gossip_hvd.__version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
    },
    extra=lambda: kept(optimizer.gossip) if lane.asked.events else {},
)
hvd.shutdown()
