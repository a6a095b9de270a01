"""A program whose rank 1 has longer epochs than the other: it must end, whoever waits for whom."""

from __future__ import annotations

import sys

from keras_models import compiled, data, sgd

import gossip_hvd.keras as hvd


def main(node_size: int, callback: str) -> None:
    hvd.init(node_size=node_size)
    model = compiled(sgd())
    x, y = data(hvd.rank(), 48 if hvd.rank() == 1 else 32)
    callbacks = [getattr(hvd.callbacks, callback)()] if callback else []
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    print(f"rank {hvd.rank()} has trained", flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if sys.argv[2:] else "")
