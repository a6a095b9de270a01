"""Small Keras models, their data, and what tests of them look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from rank import Rank
from ranks import Job

import gossip_hvd.keras as hvd

FEATURES, CLASSES = 6, 3
LAYERS = keras.layers


def on(adapters: Sequence[str], jobs: Sequence[Job]) -> list[Job]:
    """The same jobs with each adapter."""
    return [replace(job, adapter=adapter) for adapter in adapters for job in jobs]


BOTH = ("tensorflow", "keras-torch")


def network(*, name: str | None = None, **arguments: Any) -> Any:
    """Two dense layers; the same values on every rank."""
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            LAYERS.Input((FEATURES,)),
            LAYERS.Dense(8, activation="tanh", **arguments),
            LAYERS.Dense(CLASSES, dtype="float32"),
        ],
        name=name,
    )


def small() -> Any:
    """One dense layer, for what has to be compiled often."""
    keras.utils.set_random_seed(7)
    return keras.Sequential([LAYERS.Input((FEATURES,)), LAYERS.Dense(CLASSES)])


def data(rank: int, samples: int = 32) -> tuple[Any, Any]:
    """A rank's own part of the data."""
    random = np.random.default_rng(100 + rank)
    x = random.normal(size=(samples, FEATURES)).astype("float32")
    return x, (x[:, :CLASSES].argmax(1)).astype("int32")


def compiled(optimizer: Any, model: Any = None, **arguments: Any) -> Any:
    """A model that trains with the optimizer."""
    model = network() if model is None else model
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, **arguments)
    return model


def trained(
    me: Rank,
    optimizer: Any,
    model: Any = None,
    *,
    epochs: int = 1,
    callbacks: Any = (),
    **arguments: Any,
) -> Any:
    """A model after training on this rank's data: 4 steps an epoch."""
    model = compiled(optimizer, model, **arguments)
    x, y = data(me.rank)
    model.fit(
        x, y, batch_size=8, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks)
    )
    return model


def values(model: Any) -> Any:
    """All weights in one vector."""
    weights = [np.asarray(w, np.float64).ravel() for w in model.get_weights()]
    return np.concatenate(weights)


def assert_nodes_agree(me: Rank, model: Any) -> list[Any]:
    """Ranks of one node hold the same bits; returns one vector a node."""
    every = me.gather(values(model))
    for ranks in me.nodes:
        for rank in ranks[1:]:
            np.testing.assert_array_equal(every[rank], every[ranks[0]])
    return [every[ranks[0]] for ranks in me.nodes]


def differ(nodes: Sequence[Any]) -> bool:
    """Whether any two nodes hold different weights."""
    return any(not np.array_equal(nodes[0], other) for other in nodes[1:])


def sgd(**arguments: Any) -> Any:
    """Plain SGD, distributed."""
    return hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **arguments)


def backend() -> str:
    """What is beneath Keras."""
    return str(keras.backend.backend())
