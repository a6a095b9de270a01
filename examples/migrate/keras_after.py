"""The same script with gossip_hvd: it trains under Keras 3; see keras_before.py."""

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import gossip_hvd.tensorflow.keras as hvd


def main():
    hvd.init()
    tf.keras.utils.set_random_seed(hvd.rank())
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    dataset = tf.data.Dataset.from_tensor_slices((images[:1500], labels[:1500]))
    dataset = dataset.repeat().shuffle(1500).batch(32)

    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input((8, 8, 1)),
            tf.keras.layers.Conv2D(16, [3, 3], activation="relu"),
            tf.keras.layers.Conv2D(32, [3, 3], activation="relu"),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(50, activation="relu"),
            tf.keras.layers.Dense(10, activation="softmax"),
        ]
    )
    scaled_lr = 0.001 * hvd.size()
    optimizer = hvd.DistributedOptimizer(
        tf.optimizers.Adam(scaled_lr), backward_passes_per_step=1, average_aggregated_gradients=True
    )
    model.compile(
        loss=tf.losses.SparseCategoricalCrossentropy(), optimizer=optimizer, metrics=["accuracy"]
    )
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=scaled_lr, warmup_epochs=2, verbose=1),
    ]
    steps = 48 // hvd.size()
    model.fit(
        dataset, steps_per_epoch=steps, epochs=20, callbacks=callbacks, shuffle=False, verbose=0
    )

    loss, accuracy = model.evaluate(images[1500:], labels[1500:], verbose=0)
    norm = np.sqrt(sum(np.sum(weights**2) for weights in model.get_weights()))
    print(
        f"rank {hvd.rank()}: loss {loss:.4f}, accuracy {100 * accuracy:.1f} %, "
        f"norm of the weights {norm:.6f}"
    )


if __name__ == "__main__":
    main()
