"""Callbacks under ``fit`` on real ranks: Horovod's promises, and ours."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import keras
import numpy as np
import pytest
from keras_models import (
    BOTH,
    CLASSES,
    FEATURES,
    LAYERS,
    assert_nodes_agree,
    compiled,
    data,
    differ,
    network,
    on,
    sgd,
    small,
    trained,
    values,
)
from rank import Rank
from ranks import BOTH_SCOPES, Job, on_ranks

import gossip_hvd.keras as hvd
from gossip_hvd.errors import CheckpointError, ConfigError

PAIRS = on(BOTH, BOTH_SCOPES)
FOUR = on(BOTH, [Job(4), Job(5, "node", 2)])
SHARED = Path("/tmp/gossip_hvd_keras_tests")


class Record(keras.callbacks.Callback):
    """Keeps what later callbacks see."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: list[dict] = []
        self.rates: list[float] = []
        self.batches: list[float] = []

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self.batches.append(rate(self.model))

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.logs.append(dict(logs))
        self.rates.append(rate(self.model))


def rate(model) -> float:
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


def shared(me: Rank, name: str) -> Path:
    """An empty folder that all ranks see."""
    folder = SHARED / f"{name}-{me.job}"
    if me.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    me.settle()
    return folder


@on_ranks(PAIRS)
def test_broadcast_gives_everybody_the_roots_weights_before_the_first_step(me: Rank) -> None:
    model = compiled(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)))
    model.set_weights([w + me.rank for w in model.get_weights()])
    wanted = me.gather(values(model))[2]
    x, y = data(me.rank)
    model.fit(x, y, verbose=0, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(2)])
    for mine in me.gather(values(model)):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6)


@on_ranks(PAIRS)
def test_broadcast_leaves_local_variables_alone(me: Rank) -> None:
    model = network()
    local = model.layers[0].bias
    model.set_weights([w + me.rank for w in model.get_weights()])
    compiled(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0), method="allreduce"), model)
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=local)
    model.fit(*data(me.rank), verbose=0, callbacks=[callback])
    np.testing.assert_array_equal(local.numpy(), np.full(8, me.rank))
    assert (
        me.gather(model.layers[0].kernel.numpy().tobytes()).count(
            model.layers[0].kernel.numpy().tobytes()
        )
        == me.size
    )


@on_ranks(FOUR)
def test_metrics_are_means_over_ranks_and_the_same_bits_everywhere(me: Rank) -> None:
    alone, together = Record(), Record()
    model = compiled(sgd(), metrics=["accuracy"])
    x, y = data(me.rank)
    callbacks = [alone, hvd.callbacks.MetricAverageCallback(), together]
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    for own, averaged in zip(alone.logs, together.logs, strict=True):
        every = me.gather(own)
        for name, value in averaged.items():
            assert value == pytest.approx(np.mean([logs[name] for logs in every]))
        assert len(set(me.gather(json.dumps(averaged, sort_keys=True)))) == 1
    assert len({logs["loss"] for logs in me.gather(alone.logs[-1])}) == me.size


@on_ranks(FOUR)
def test_ranks_stop_and_slow_down_together(me: Rank) -> None:
    """Each rank alone would decide otherwise: its own metric says so at another epoch."""

    class Own(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            logs["val_loss"] = 1.0 / (epoch + 1) if epoch < 2 + me.rank else 10.0

    record = Record()
    model = compiled(sgd())
    callbacks = [
        Own(),
        hvd.callbacks.MetricAverageCallback(),
        keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=1, min_delta=0),
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=3, min_delta=0),
        record,
    ]
    x, y = data(me.rank)
    model.fit(x, y, batch_size=8, epochs=20, verbose=0, callbacks=callbacks)
    assert len(record.rates) < 20
    assert min(record.rates) < 0.1
    assert all(rates == record.rates for rates in me.gather(record.rates))
    assert_nodes_agree(me, model)


@on_ranks(PAIRS)
def test_warm_up_ends_at_the_full_rate(me: Rank) -> None:
    record = Record()
    model = compiled(hvd.DistributedOptimizer(keras.optimizers.SGD(0.8, momentum=0.9)))
    callback = hvd.callbacks.LearningRateWarmupCallback(0.8, warmup_epochs=2)
    x, y = data(me.rank)
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, shuffle=False, callbacks=[callback, record])
    size, steps = me.size, 8
    wanted = [0.8 / size * ((step + 1) / 4 * (size - 1) / 2 + 1) for step in range(steps)]
    np.testing.assert_allclose(record.batches[:steps], wanted, rtol=1e-5)
    np.testing.assert_allclose(record.batches[steps:], 0.8, rtol=1e-5)
    assert record.logs[0]["lr"] == pytest.approx(wanted[3], rel=1e-5)
    assert_nodes_agree(me, model)


@on_ranks(PAIRS)
def test_a_schedule_by_epochs(me: Rank) -> None:
    record = Record()
    callbacks = [
        hvd.callbacks.LearningRateScheduleCallback(0.1, lambda epoch: 1.0, end_epoch=1),
        hvd.callbacks.LearningRateScheduleCallback(0.1, 0.5, start_epoch=1, end_epoch=3),
        record,
    ]
    model = compiled(sgd())
    x, y = data(me.rank)
    model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=callbacks)
    np.testing.assert_allclose(record.rates, [0.1, 0.1, 0.05, 0.05], rtol=1e-6)
    with pytest.raises(ValueError, match="initial_lr"):
        hvd.callbacks.LearningRateScheduleCallback(None, 0.5)


@on_ranks(on(BOTH, [Job(2, "node", 2)]))
def test_momentum_is_corrected_when_the_rate_changes(me: Rank) -> None:
    """v ← μ (γ'/γ) v − γ' g, by hand."""
    results = []
    for corrected in (True, False):
        model = network()
        start = values(model)
        compiled(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), model)
        callback = hvd.callbacks.LearningRateScheduleCallback(
            0.1, lambda epoch: 1.0 if epoch < 1 else 0.5, momentum_correction=corrected
        )
        x, y = data(0)
        model.fit(x[:8], y[:8], batch_size=8, epochs=1, verbose=0, callbacks=[callback])
        velocity = np.concatenate([v.numpy().ravel() for v in model.optimizer.momentums])
        np.testing.assert_allclose(velocity, values(model) - start, atol=1e-6)
        model.fit(
            x[:8], y[:8], batch_size=8, initial_epoch=1, epochs=2, verbose=0, callbacks=[callback]
        )
        results.append((values(model), velocity))
    (with_it, velocity), (without, _) = results
    np.testing.assert_allclose(without - with_it, 0.9 * 0.5 * velocity, atol=1e-6)


@on_ranks(FOUR)
def test_validation_of_the_merged_model_and_back(me: Rank) -> None:
    seen = []

    class Look(keras.callbacks.Callback):
        def on_test_begin(self, logs=None) -> None:
            seen.append(values(self.model))

    record = Record()
    model = compiled(sgd(), metrics=["accuracy"])
    x, y = data(me.rank)
    callbacks = [hvd.callbacks.GossipCallback(merge=2, restore=True), Look(), record]
    model.fit(
        x, y, batch_size=8, epochs=2, verbose=0, validation_data=data(77), callbacks=callbacks
    )
    first, second = (me.gather(s) for s in seen)
    assert differ(first)
    assert not differ(second)
    logs = me.gather(record.logs)
    assert len({each[1]["val_loss"] for each in logs}) == 1
    assert len({each[0]["val_loss"] for each in logs}) > 1
    for each in record.logs:
        assert each["consensus_distance"] > 0
        assert each["gossip_rounds"] == 4
        assert each["gossip_megabytes"] > 0
        assert each["gossip_seconds"] > 0
    # Merged once more when training ended.
    assert not differ(me.gather(values(model)))


@on_ranks(FOUR)
def test_batch_normalisation_is_merged_too_and_every_node_counts_once(me: Rank) -> None:
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [LAYERS.Input((FEATURES,)), LAYERS.BatchNormalization(), LAYERS.Dense(CLASSES)]
    )
    before = []

    class Look(keras.callbacks.Callback):
        def on_train_end(self, logs=None) -> None:
            before.append(model.layers[0].moving_mean.numpy())

    x, y = data(me.rank)
    callbacks = [Look(), hvd.callbacks.GossipCallback()]
    compiled(sgd(), model).fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
    assert not differ(me.gather(values(model)))
    every = me.gather(before[0])
    assert differ(every)
    wanted = np.mean([np.mean([every[r] for r in ranks], axis=0) for ranks in me.nodes], axis=0)
    np.testing.assert_allclose(model.layers[0].moving_mean.numpy(), wanted, rtol=1e-5)


@on_ranks(on(BOTH, [Job(2)]))
def test_the_best_model_is_saved_by_rank_0_alone(me: Rank) -> None:
    folder = shared(me, "best")
    path = folder / "best.keras"
    x, y = data(me.rank)
    callbacks = [
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.BestModelCheckpoint(monitor="loss", filepath=path),
        weights := hvd.callbacks.BestModelCheckpoint("loss", save_weights_only=True),
    ]
    weights.filepath = folder / "best.weights.h5"
    model = compiled(sgd())
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    me.settle()
    assert {p.name for p in folder.iterdir()} == {"best.keras", "best.weights.h5"}
    assert keras.saving.load_model(path).optimizer is not None
    with pytest.raises(ConfigError, match="filepath"):
        model.fit(x, y, verbose=0, callbacks=[hvd.callbacks.BestModelCheckpoint()])


@on_ranks(on(BOTH, [Job(4), *BOTH_SCOPES]))
def test_going_on_from_a_checkpoint_is_exact(me: Rank) -> None:
    check_going_on(me, timing="awc", seed=3)


@on_ranks(on(BOTH, [Job(4)]))
def test_going_on_is_exact_for_methods_with_arrays_of_their_own(me: Rank) -> None:
    check_going_on(me, method="slowmo")


def check_going_on(me: Rank, **options) -> None:
    folder = shared(me, "checkpoint")

    def run(epochs: int, into: Path) -> np.ndarray:
        keras.utils.set_random_seed(5)
        model = keras.Sequential(
            [
                LAYERS.Input((FEATURES,)),
                LAYERS.Dense(8),
                LAYERS.BatchNormalization(),
                LAYERS.Dropout(0.3, seed=me.rank),
                LAYERS.Dense(CLASSES),
            ]
        )
        optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **options)
        compiled(optimizer, model)
        x, y = data(me.rank)
        checkpoint = hvd.callbacks.GossipCheckpoint(into, keep=5)
        model.fit(
            x, y, batch_size=8, epochs=epochs, verbose=0, shuffle=False, callbacks=[checkpoint]
        )
        assert optimizer.gossip.round == 4 * epochs
        assert not model._initial_epoch  # another fit begins with its first epoch
        return values(model)

    whole = run(4, folder / "whole")
    run(2, folder / "parts")
    np.testing.assert_array_equal(run(4, folder / "parts"), whole)
    assert len(list((folder / "parts").iterdir())) == 4


@on_ranks(on(BOTH, [Job(2)]))
def test_a_checkpoint_of_another_model_is_refused(me: Rank) -> None:
    folder = shared(me, "other")
    trained(me, sgd(), callbacks=[hvd.callbacks.GossipCheckpoint(folder)])
    with pytest.raises(CheckpointError, match="other shapes"):
        trained(me, sgd(), small(), callbacks=[hvd.callbacks.GossipCheckpoint(folder)])


@on_ranks(on(BOTH, [Job(2)]), bare=True)
def test_other_nodes_go_on_from_the_mean(me: Rank) -> None:
    folder = shared(me, "nodes")
    hvd.init(node_size=1)
    model = trained(me, sgd(timing="awc"), callbacks=[hvd.callbacks.GossipCheckpoint(folder)])
    replicas = me.gather(values(model))
    assert differ(replicas)
    hvd.shutdown()
    hvd.init(node_size=2)
    checkpoint = hvd.callbacks.GossipCheckpoint(folder)
    again = compiled(sgd())
    checkpoint.set_model(again)
    assert checkpoint.restore() is not None
    np.testing.assert_allclose(values(again), np.mean(replicas, axis=0), atol=1e-7)
    assert again._initial_epoch == 1


@on_ranks(on(BOTH, [Job(2)]), bare=True)
def test_a_signal_saves_and_the_interrupted_epoch_begins_again(me: Rank) -> None:
    folder = shared(me, "signal")

    class Term(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None) -> None:
            if epoch == 1 and me.rank == 1:
                signal.raise_signal(signal.SIGTERM)

    hvd.init(node_size=1)
    model = compiled(sgd())
    x, y = data(me.rank)
    leaving = hvd.callbacks.GossipCheckpoint(folder, every=10**6, on_terminate=True)
    with pytest.raises(SystemExit) as left:
        model.fit(x, y, batch_size=8, epochs=10**5, verbose=0, callbacks=[Term(), leaving])
    assert left.value.code == 143
    steps = me.gather(int(keras.ops.convert_to_numpy(model.optimizer.iterations)))
    assert len(set(steps)) == 1
    held = values(model)
    hvd.shutdown()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    hvd.init(node_size=1)
    checkpoint = hvd.callbacks.GossipCheckpoint(folder, on_terminate=True)
    again = compiled(sgd())
    checkpoint.set_model(again)
    assert checkpoint.restore() is not None
    np.testing.assert_array_equal(values(again), held)
    assert again._initial_epoch == (steps[0] - 1) // 4
    # Whoever had the signal before training has it again afterwards.
    before = signal.getsignal(signal.SIGTERM)
    last = again._initial_epoch + 2
    again.fit(x, y, batch_size=8, epochs=last, verbose=0, callbacks=[checkpoint])
    assert signal.getsignal(signal.SIGTERM) == before


@on_ranks(FOUR)
def test_validating_the_merged_model_leaves_no_trace(me: Rank) -> None:
    class Look(keras.callbacks.Callback):
        def on_train_end(self, logs=None) -> None:
            self.seen = values(self.model)

    def run(*callbacks, **options) -> np.ndarray:
        look = Look()
        model = compiled(sgd(**options))
        x, y = data(me.rank)
        some = {"validation_data": data(77), "callbacks": [look, *callbacks], "shuffle": False}
        model.fit(x, y, batch_size=8, epochs=3, verbose=0, **some)
        return look.seen

    for method in ("crossover", "sgp"):
        keras.utils.set_random_seed(3)
        plain = run(method=method)
        keras.utils.set_random_seed(3)
        merging = hvd.callbacks.GossipCallback(merge=1, restore=True)
        np.testing.assert_array_equal(run(merging, method=method), plain)


@on_ranks(on(("tensorflow",), [Job(2)]))
def test_tensorboard_behind_the_callback_writes_what_gossip_does(me: Rank) -> None:
    tf = pytest.importorskip("tensorflow")
    folder = shared(me, "board") / f"{me.rank}"
    board = keras.callbacks.TensorBoard(folder, write_graph=False)
    trained(me, sgd(), epochs=2, callbacks=[hvd.callbacks.GossipCallback(), board])
    written: dict[str, list[int]] = {}
    for file in (folder / "train").glob("events.*"):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                written.setdefault(value.tag, []).append(event.step)
    for name in ("consensus_distance", "gossip_rounds", "gossip_megabytes", "gossip_seconds"):
        assert written[f"epoch_{name}"] == [0, 1]
