"""What a training step of Keras costs more with gossip: per variant, beside the floor it stands on.

    python -m benchmarks.keras_overhead [--ranks 2] [--steps 40] [--rounds 5] [--json FILE]

Every variant trains the same dense model (33 thousand or 8.4 million parameters) on the same
batch. Variants take turns, some steps each, so that what else the machine does hits all alike; the
figure is the median over turns of the mean step. Floors are measured in the same run: Horovod's own
reduction of the same gradients, and a ``numpy_function`` that is given all weights and returns
them, which is the least that a round in a graph can be. The profile is of our own code: *pack*,
copying variables into the flat bytes; *round*, sending, waiting, mixing; *unpack*, copying what has
changed for TensorFlow. What is left above the floor is the graph's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("pack", "round", "unpack")

RESULT = "keras_overhead:"
MODELS = {"33k": (32, (128, 128, 64)), "8.4M": (1024, (2048, 2048, 1024))}
BATCH = 64


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="of one turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        measure(asked.steps, asked.rounds)
        return
    results = [launch(asked, ranks, size) for ranks, size in ((1, 1), (asked.ranks, asked.ranks))]
    results.append(launch(asked, asked.ranks, 1))
    for result in results:
        show(result)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1) + "\n")


def launch(asked: argparse.Namespace, ranks: int, node_size: int) -> dict[str, Any]:
    """One job's figures."""
    command = ["mpirun", "-np", f"{ranks}", "--bind-to", "none", "--oversubscribe"]
    command += [sys.executable, "-m", "benchmarks.keras_overhead", "--inside"]
    command += ["--steps", f"{asked.steps}", "--rounds", f"{asked.rounds}"]
    environ = {
        **os.environ,
        "GOSSIP_HVD_NODE_SIZE": f"{node_size}",
        "KERAS_BACKEND": "tensorflow",
        "TF_NUM_INTRAOP_THREADS": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    line = next(line for line in done.stdout.splitlines() if RESULT in line)
    result: dict[str, Any] = json.loads(line.partition(RESULT)[2])
    return result


def show(result: dict[str, Any]) -> None:
    """One job's table."""
    print(f"\n{result['ranks']} ranks, {result['nodes']} nodes, load {result['load']:.1f}")
    parts = "".join(f"{part:>9}" for part in PARTS)
    print(f"{'model':>6} {'variant':28} {'ms a step':>10} {'over plain':>11}{parts}  ms")
    for row in result["rows"]:
        over = row["ms"] / row["plain"] - 1
        parts = "".join(f"{row[part]:9.2f}" for part in PARTS)
        print(f"{row['model']:>6} {row['variant']:28} {row['ms']:10.2f} {over:11.1%}{parts}")


def measure(steps: int, rounds: int) -> None:
    """Every variant's step time on this job; rank 0 prints."""
    import gossip_hvd.tensorflow as hvd

    hvd.init()
    rows = []
    for name, (features, widths) in MODELS.items():
        runs = {kind: variant(features, widths, kind) for kind in variants(hvd.nodes(), hvd.size())}
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        profiles: dict[str, list[list[float]]] = {kind: [] for kind in runs}
        for turn in range(rounds + 1):
            for kind, (step, spent) in runs.items():
                hvd.barrier()
                before, started = spent(), time.perf_counter()
                for _ in range(steps):
                    step()
                if turn:  # the first turn traces and warms up
                    times[kind].append((time.perf_counter() - started) / steps * 1e3)
                    after = spent()
                    parts = zip(before, after, strict=True)
                    profiles[kind].append([(b - a) / steps * 1e3 for a, b in parts])
        plain = statistics.median(times["plain"])
        for kind in runs:
            rows.append(
                {
                    "model": name,
                    "variant": kind,
                    "ms": statistics.median(times[kind]),
                    "least": min(times[kind]),
                    **{
                        part: statistics.median(turn[i] for turn in profiles[kind])
                        for i, part in enumerate(PARTS)
                    },
                    "plain": plain,
                }
            )
    if hvd.rank() == 0:
        load = os.getloadavg()[0]
        about = {"ranks": hvd.size(), "nodes": hvd.nodes(), "load": load, "steps": steps}
        print(RESULT + json.dumps({**about, "rounds": rounds, "rows": rows}), flush=True)
    hvd.shutdown()


def variants(nodes: int, ranks: int) -> list[str]:
    """What there is to compare in a job."""
    if ranks == 1:
        return ["plain", "distributed"]
    if nodes == 1:
        return ["plain", "floor: Horovod alone", "distributed"]
    return ["plain", "floor: numpy_function", "distributed", "distributed awc"]


def variant(features: int, widths: tuple[int, ...], kind: str) -> tuple[Callable[[], Any], Profile]:
    """One training step, and the seconds that our own code has taken so far."""
    import horovod.tensorflow as horovod
    import keras
    import numpy as np
    import tensorflow as tf

    import gossip_hvd.tensorflow as hvd

    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(width, activation="relu") for width in widths]
    model = keras.Sequential([keras.layers.Input((features,)), *dense, keras.layers.Dense(10)])
    optimizer = keras.optimizers.SGD(1e-3)
    if kind.startswith("distributed"):
        timing = "awc" if kind.endswith("awc") else "atc"
        optimizer = hvd.DistributedOptimizer(optimizer, timing=timing)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    random = np.random.default_rng(hvd.rank())
    x = tf.constant(random.normal(size=(BATCH, features)).astype("float32"))
    y = tf.constant(random.integers(0, 10, BATCH))
    variables = model.trainable_variables

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        gradients = tape.gradient(value, variables)
        if "Horovod" in kind:
            gradients = [
                horovod.allreduce(g, name=f"floor_{i}", ignore_name_scope=True)
                for i, g in enumerate(gradients)
            ]
        optimizer.apply(gradients, variables)
        if "numpy_function" in kind:
            held = [v.value.read_value() for v in variables]
            same = tf.numpy_function(lambda *arrays: arrays, held, [h.dtype for h in held])
            for v, value in zip(variables, same, strict=True):
                v.value.assign(tf.ensure_shape(value, v.shape))

    return step, Profile(getattr(optimizer, "gossip", None))


class Profile:
    """The seconds that the parts of our own code have taken so far, by ``PARTS``."""

    def __init__(self, gossip: Any) -> None:
        self._gossip, self._spent = gossip, dict.fromkeys(("load", "take"), 0.0)
        self._begun = False

    def __call__(self) -> list[float]:
        if self._gossip is None or not self._gossip.begun:
            return [0.0] * len(PARTS)
        if not self._begun:
            self._begun = True
            for name in self._spent:
                self._time(self._gossip.engine.seat.memory, name)
        packing, unpacking = self._spent.values()
        return [packing, self._gossip.seconds - packing, unpacking]

    def _time(self, memory: Any, name: str) -> None:
        function = getattr(memory, name)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self._spent[name] += time.perf_counter() - started
            return result

        setattr(memory, name, timed)


if __name__ == "__main__":
    main()
