"""Horovod's optimizer under Keras 3 averages nothing and says nothing: see for yourself.

    mpirun -np 2 python keras_silence.py horovod.tensorflow.keras
    mpirun -np 2 python keras_silence.py gossip_hvd.tensorflow.keras

The ranks start from the same weights and train on different halves of the digits. Where gradients
are averaged, weights stay equal, to the bit.
"""

import importlib
import sys

import keras
import numpy as np
from sklearn.datasets import load_digits


def main():
    hvd = importlib.import_module(sys.argv[1])
    hvd.init()
    images, labels = load_digits(return_X_y=True)
    mine = slice(hvd.rank(), None, hvd.size())
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(10)])
    # The node's ranks, or all of Horovod's, average their gradients in every step.
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)
    model.fit(images[mine] / 16, labels[mine], batch_size=32, epochs=3, verbose=0)

    norm = np.sqrt(sum(np.sum(weights.astype("float64") ** 2) for weights in model.get_weights()))
    norms = hvd.allgather(np.array([norm])).numpy()
    if hvd.rank() == 0:
        said = "equal" if np.ptp(norms) == 0 else "different: nothing was averaged"
        print(f"{sys.argv[1]}: norms of the ranks' weights {norms.round(6)}, {said}")


if __name__ == "__main__":
    main()
