"""Training under Keras on real ranks: what every rank must hold afterwards."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from keras_models import (
    BOTH,
    CLASSES,
    FEATURES,
    LAYERS,
    assert_nodes_agree,
    backend,
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
from ranks import ALONE, BOTH_SCOPES, Job, on_ranks

import gossip_hvd.keras as hvd
from gossip_hvd.errors import ConfigError
from gossip_hvd.methods import METHODS

EVERYWHERE = on(BOTH, [*ALONE, Job(2), Job(2, "node", 2), *BOTH_SCOPES, Job(5, "node", 2), Job(5)])
PAIRS = on(BOTH, BOTH_SCOPES)
ONE_SCOPE = on(BOTH, BOTH_SCOPES[:1])
TENSORFLOW = on(BOTH[:1], BOTH_SCOPES)

NOT_WITH_EVERY_OPTIMIZER = {"decentlam", "quasi_global", "schedule"}
"""They compute with SGD's momentum, which Keras keeps in another form; a schedule needs methods."""

OPTIMIZERS = [
    name
    for name in dir(keras.optimizers)
    if isinstance(kind := getattr(keras.optimizers, name), type)
    and issubclass(kind, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
]


@on_ranks(EVERYWHERE)
def test_ranks_of_a_node_hold_the_same_bits_after_fit(me: Rank) -> None:
    model = trained(me, hvd.DistributedOptimizer(keras.optimizers.Adam(0.05)), epochs=2)
    nodes = assert_nodes_agree(me, model)
    gossip = model.optimizer.gossip
    if len(nodes) > 1:
        assert gossip.round == 8
        assert gossip.bytes_sent > 0
    if len(nodes) > 2:
        assert differ(nodes)
        assert gossip.consensus_distance() > 0
    gossip.average_parameters()
    assert len({v.tobytes() for v in me.gather(values(model))}) == 1


@on_ranks(on(BOTH, [Job(2, "node", 2)]))
def test_without_reduction_the_same_check_fails(me: Rank) -> None:
    """The silent failure of Horovod under Keras 3, which trains each rank for itself."""
    model = trained(me, keras.optimizers.Adam(0.05))
    assert differ(me.gather(values(model)))
    with pytest.raises(AssertionError):
        assert_nodes_agree(me, model)


def by_hand(me: Rank, *, everywhere: bool, steps: int) -> list[np.ndarray]:
    """The same network trained with NumPy: SGD on each node's mean gradient, then a mean of two."""
    start = [np.asarray(w, np.float64) for w in network().get_weights()]
    nodes = [[w.copy() for w in start] for _ in me.nodes]
    parts = [data(rank) for rank in range(me.size)]
    for step in range(steps):
        means = []
        for weights, ranks in zip(nodes, me.nodes, strict=True):
            every = [gradient(weights, *batch(parts[rank], step)) for rank in ranks]
            means.append([sum(g) / len(ranks) for g in zip(*every, strict=True)])
        if everywhere:
            means = [[sum(g) / len(means) for g in zip(*means, strict=True)]] * len(means)
        nodes = [
            [w - 0.1 * g for w, g in zip(weights, mean, strict=True)]
            for weights, mean in zip(nodes, means, strict=True)
        ]
        if not everywhere:
            mixed = [sum(w) / len(nodes) for w in zip(*nodes, strict=True)]
            nodes = [[w.copy() for w in mixed] for _ in nodes]
    return [np.concatenate([w.ravel() for w in weights]) for weights in nodes]


def batch(part, step: int):
    x, y = part
    rows = slice(8 * step % len(x), 8 * step % len(x) + 8)
    return x[rows].astype(np.float64), y[rows]


def gradient(weights, x, y):
    """Of the mean cross-entropy of ``tanh(x W₁ + b₁) W₂ + b₂``."""
    w1, b1, w2, b2 = weights
    h = np.tanh(x @ w1 + b1)
    z = h @ w2 + b2
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    d = (p @ w2.T) * (1 - h * h)
    return [x.T @ d, d.sum(0), h.T @ p, p.sum(0)]


def check_by_hand(me: Rank, method: str) -> None:
    model = trained(me, sgd(method=method), epochs=2)
    expected = by_hand(me, everywhere=method == "allreduce", steps=8)
    np.testing.assert_allclose(values(model), expected[me.node], atol=2e-6)


@on_ranks(PAIRS)
def test_crossover_of_two_nodes_equals_numpy(me: Rank) -> None:
    check_by_hand(me, "crossover")


@on_ranks(PAIRS)
def test_gossip_of_two_nodes_equals_numpy(me: Rank) -> None:
    check_by_hand(me, "gossip")


@on_ranks(PAIRS)
def test_allreduce_equals_numpy(me: Rank) -> None:
    check_by_hand(me, "allreduce")


def check_optimizers(me: Rank, names: list[str]) -> None:
    for name in names:
        plain = getattr(keras.optimizers, name)()
        kind = type(plain)
        optimizer = hvd.DistributedOptimizer(plain)
        assert optimizer is plain
        assert isinstance(optimizer, getattr(keras.optimizers, name))
        assert type(optimizer).__name__ == kind.__name__
        again = type(optimizer).from_config(optimizer.get_config())
        assert type(again) is kind
        nodes = assert_nodes_agree(me, trained(me, optimizer, small()))
        assert not differ(nodes), name


@on_ranks(ONE_SCOPE)
def test_stock_optimizers_first_part(me: Rank) -> None:
    assert len(OPTIMIZERS) >= 11
    check_optimizers(me, OPTIMIZERS[::3])


@on_ranks(ONE_SCOPE)
def test_stock_optimizers_second_part(me: Rank) -> None:
    check_optimizers(me, OPTIMIZERS[1::3])


@on_ranks(ONE_SCOPE)
def test_stock_optimizers_third_part(me: Rank) -> None:
    check_optimizers(me, OPTIMIZERS[2::3])


@on_ranks(ONE_SCOPE)
def test_an_optimizer_of_several(me: Rank) -> None:
    kinds = [keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01)]
    several = keras.optimizers.MultiOptimizer(lambda v: kinds[v.path.endswith("kernel")])
    model = trained(me, hvd.DistributedOptimizer(several), small())
    assert not differ(assert_nodes_agree(me, model))
    assert model.optimizer.gossip.round == 4


@on_ranks(on(BOTH, [Job(4)]))
def test_four_nodes_mix_without_losing_their_mean(me: Rank) -> None:
    """Sum of all weights: that of nodes which never meet, within rounding."""
    alone = np.mean(me.gather(values(trained(me, keras.optimizers.SGD(0.0)))), axis=0)
    model = trained(me, hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)))
    np.testing.assert_allclose(np.mean(me.gather(values(model)), axis=0), alone, atol=1e-7)


@on_ranks(ONE_SCOPE)
def test_settings_of_the_optimizer_hold(me: Rank) -> None:
    kinds = {
        "clipnorm": {"clipnorm": 0.01},
        "global_clipnorm": {"global_clipnorm": 0.01},
        "clipvalue": {"clipvalue": 0.001},
        "ema": {"use_ema": True, "ema_overwrite_frequency": 2},
        "decay": {"weight_decay": 0.1},
    }
    for name, arguments in kinds.items():
        plain = keras.optimizers.SGD(0.1, momentum=0.9, **arguments)
        model = trained(me, hvd.DistributedOptimizer(plain), small())
        assert_nodes_agree(me, model)
        assert model.optimizer.gossip.round == 4, name
        again = type(plain).from_config(plain.get_config())
        alone = trained(me, hvd.DistributedOptimizer(again, method="none"), small())
        alike = type(plain).from_config(plain.get_config())
        np.testing.assert_allclose(
            values(alone), values(by_the_whole_node(me, alike)), atol=1e-6, err_msg=name
        )


def by_the_whole_node(me: Rank, optimizer):
    """A model that one process trains with plain Keras on the batches of all ranks of its node."""
    (ranks,) = (ranks for ranks in me.nodes if me.rank in ranks)
    columns = zip(*(data(rank) for rank in ranks), strict=True)
    x, y = (
        np.concatenate([np.reshape(part, (4, 8, *np.shape(part)[1:])) for part in parts], axis=1)
        for parts in columns
    )
    model = compiled(optimizer, small())
    size = x.shape[1]
    x, y = (all_.reshape(-1, *all_.shape[2:]) for all_ in (x, y))
    model.fit(x, y, batch_size=size, verbose=0, shuffle=False)
    return model


@on_ranks(ONE_SCOPE)
def test_horovods_arguments_of_the_average_hold(me: Rank) -> None:
    def run(rate: float = 0.1, **arguments) -> np.ndarray:
        plain = keras.optimizers.SGD(rate)
        return values(trained(me, hvd.DistributedOptimizer(plain, method="none", **arguments)))

    means = run()
    for arguments in ({"num_groups": 2}, {"groups": 2}, {"gradient_predivide_factor": 2.0}):
        np.testing.assert_allclose(run(**arguments), means, atol=1e-6)
    np.testing.assert_allclose(run(0.05, op=hvd.Sum), means, atol=1e-6)
    rounded = run(compression=hvd.Compression.fp16)
    np.testing.assert_allclose(rounded, means, atol=1e-3)
    assert not np.array_equal(rounded, means)
    renamed = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), name="another")
    assert renamed.name == "another"


@on_ranks(ONE_SCOPE)
def test_gradients_are_averaged_before_they_are_clipped(me: Rank) -> None:
    clip = 0.05
    model = network()
    before = values(model)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0, global_clipnorm=clip), method="allreduce"
    )
    x, y = data(me.rank)
    compiled(optimizer, model).train_on_batch(x, y)
    assert np.linalg.norm(values(model) - before) == pytest.approx(clip, rel=1e-4)


@on_ranks(ONE_SCOPE)
def test_accumulated_gradients_are_reduced_once(me: Rank) -> None:
    """Two batches of 8, averaged by Keras: one step on their 16 samples."""
    model = trained(
        me, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    )
    assert_nodes_agree(me, model)
    assert model.optimizer.gossip.round == 2
    other = trained(
        me,
        hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.1), backward_passes_per_step=2, average_aggregated_gradients=True
        ),
    )
    np.testing.assert_array_equal(values(other), values(model))
    added = trained(
        me, hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), backward_passes_per_step=2)
    )
    np.testing.assert_allclose(values(added), values(model), atol=1e-6)


@on_ranks(ONE_SCOPE)
def test_passes_are_added_inside_loss_scaling_too(me: Rank) -> None:
    """The loss's scale is a power of two, and costs no bit."""

    def run(wrapped) -> np.ndarray:
        options = {"backward_passes_per_step": 2, "method": "none"}
        return values(trained(me, hvd.DistributedOptimizer(wrapped, **options)))

    plain = run(keras.optimizers.SGD(0.05))
    scaled = run(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05)))
    np.testing.assert_allclose(scaled, plain, atol=1e-6)
    several = keras.optimizers.MultiOptimizer(lambda v: keras.optimizers.SGD(0.1))
    with pytest.raises(ConfigError, match="MultiOptimizer does not accumulate"):
        hvd.DistributedOptimizer(several, backward_passes_per_step=2)


@on_ranks(ONE_SCOPE)
def test_embeddings_with_and_without_dense_gradients(me: Rank) -> None:
    random = np.random.default_rng(me.rank)
    x, y = random.integers(0, 20, (32, 4)), random.integers(0, CLASSES, 32)
    results = []
    for dense in (False, True):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([LAYERS.Embedding(20, 4), LAYERS.Flatten(), LAYERS.Dense(CLASSES)])
        compiled(sgd(sparse_as_dense=dense), model).fit(
            x, y, batch_size=8, verbose=0, shuffle=False
        )
        assert_nodes_agree(me, model)
        results.append(values(model))
    np.testing.assert_allclose(*results, atol=1e-6)


@on_ranks(PAIRS)
def test_layers_unfrozen_with_a_second_compile(me: Rank) -> None:
    model = network()
    model.layers[0].trainable = False
    frozen = model.layers[0].get_weights()[0].copy()
    x, y = data(me.rank)
    compiled(sgd(timing="awc"), model).fit(x, y, batch_size=8, verbose=0)
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], frozen)
    model.layers[0].trainable = True
    compiled(sgd(timing="awc"), model).fit(x, y, batch_size=8, verbose=0)
    assert not np.array_equal(model.layers[0].get_weights()[0], frozen)
    model.optimizer.gossip.drain()
    assert_nodes_agree(me, model)


@on_ranks(PAIRS)
def test_several_models_and_one_that_only_one_rank_has(me: Rank) -> None:
    if me.rank == 1:  # Keras numbers layers and optimizers by what a process has made.
        compiled(keras.optimizers.Adam(), network()).train_on_batch(*data(0))
    first, second = network(), network()
    compiled(sgd(), first)
    compiled(sgd(method="gossip"), second)
    x, y = data(me.rank)
    for _ in range(2):
        first.fit(x, y, batch_size=8, verbose=0)
        second.fit(x, y, batch_size=16, verbose=0)
    assert_nodes_agree(me, first)
    assert_nodes_agree(me, second)
    assert first.optimizer.gossip.round == 8
    assert second.optimizer.gossip.round == 4


@on_ranks(ONE_SCOPE)
def test_ways_to_train_give_the_same_weights(me: Rank) -> None:
    ways = [{"run_eagerly": True}]
    if backend() == "tensorflow":
        ways += [{"steps_per_execution": 2}, {"steps_per_execution": 3}]
    expected = values(trained(me, sgd(), epochs=2))
    for way in ways:
        model = trained(me, sgd(), epochs=2, **way)
        assert_nodes_agree(me, model)
        np.testing.assert_allclose(values(model), expected, atol=1e-6)
        assert model.optimizer.gossip.round == 8
    model = compiled(sgd())
    x, y = data(me.rank)
    for step in range(8):
        rows = slice(8 * step % 32, 8 * step % 32 + 8)
        model.train_on_batch(x[rows], y[rows])
    np.testing.assert_allclose(values(model), expected, atol=1e-6)


@on_ranks(ONE_SCOPE)
def test_functional_and_subclassed_models(me: Rank) -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = LAYERS.Dense(5), LAYERS.Dense(CLASSES)

        def call(self, inputs):
            return self.second(self.first(inputs))

    keras.utils.set_random_seed(2)
    inputs = LAYERS.Input((FEATURES,))
    hidden = LAYERS.BatchNormalization()(LAYERS.Dense(4)(inputs))
    functional = keras.Model(inputs, LAYERS.Dense(CLASSES)(hidden))
    x, y = data(me.rank)
    for model in (functional, Own()):
        compiled(sgd(), model).fit(x, y, batch_size=8, verbose=0)
        trainable = [np.asarray(v.numpy()).tobytes() for v in model.trainable_variables]
        every = me.gather(trainable)
        assert all(every[rank] == every[ranks[0]] for ranks in me.nodes for rank in ranks)


@on_ranks(on(BOTH, [Job(4), *BOTH_SCOPES]))
def test_overlapped_rounds_on_a_narrow_wire(me: Rank) -> None:
    model = trained(me, sgd(timing="awc", wire_dtype="bfloat16", staleness=1), epochs=3)
    model.optimizer.gossip.drain()
    assert_nodes_agree(me, model)
    assert model.optimizer.gossip.round == 12


class Waits(LAYERS.Layer):
    """Waits in the forward pass until the exchange in flight has arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.gossip = None
        self.seen: list[bool] = []

    def look(self) -> np.ndarray:
        engine = self.gossip.engine if self.gossip and self.gossip.begun else None
        for flight in () if engine is None else engine._flying:
            until = time.monotonic() + 20.0
            while not flight.arrived and time.monotonic() < until:
                time.sleep(0.001)
            self.seen.append(flight.arrived)
        return np.float32(0.0)

    def call(self, x):
        if backend() == "torch":
            return x + float(self.look())
        return x + tf().ensure_shape(tf().numpy_function(self.look, [], "float32"), [])


def tf():
    import tensorflow

    return tensorflow


@on_ranks(on(BOTH, [Job(4), Job(4, "node", 2)]))
def test_bytes_travel_while_the_graph_computes(me: Rank) -> None:
    wait = Waits()
    keras.utils.set_random_seed(1)
    model = keras.Sequential([LAYERS.Input((FEATURES,)), LAYERS.Dense(CLASSES), wait])
    optimizer = sgd(timing="awc")
    object.__setattr__(wait, "gossip", optimizer.gossip)
    x, y = data(me.rank)
    compiled(optimizer, model).fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert wait.seen == [True] * 7


@on_ranks(on(BOTH, [Job(4)]))
def test_every_method_runs(me: Rank) -> None:
    refused = set()
    for name in sorted(METHODS):
        for optimizer in (keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1, momentum=0.9)):
            try:
                wrapped = hvd.DistributedOptimizer(optimizer, method=name)
            except ConfigError:
                refused.add((name, optimizer.name))
                continue
            model = trained(me, wrapped, small())
            wrapped.gossip.drain()
            assert np.isfinite(values(model)).all(), name
            assert_nodes_agree(me, model)
            break
    assert {name for name, _ in refused} <= NOT_WITH_EVERY_OPTIMIZER, refused


@on_ranks(PAIRS)
def test_an_overflow_on_one_rank_stops_nobody(me: Rank) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9))
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    model = compiled(optimizer)
    x, y = data(me.rank)
    for step in range(4):
        part = x[:8] * (np.float32(1e30) if (step, me.rank) == (1, 1) else 1)
        model.train_on_batch(part, y[:8])
    assert_nodes_agree(me, model)
    assert np.isfinite(values(model)).all()
    scales = me.gather(float(keras.ops.convert_to_numpy(optimizer.dynamic_scale)))
    for ranks in me.nodes:
        skipped = 1 in ranks
        assert {scales[rank] for rank in ranks} == {2.0**14 if skipped else 2.0**15}
    assert optimizer.gossip.round == 4


@on_ranks(ONE_SCOPE)
def test_mixed_bfloat16_and_bfloat16_weights(me: Rank) -> None:
    for policy in ("mixed_bfloat16", "bfloat16"):
        keras.config.set_dtype_policy(policy)
        assert_nodes_agree(me, trained(me, sgd()))


@on_ranks(on(BOTH, [Job(2, "node", 2)]))
def test_a_model_that_is_mixed_alone_says_how_to_distribute_it(me: Rank) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    model = network()
    keras.config.set_dtype_policy("float32")
    compiled(sgd(), model)
    with pytest.raises(ConfigError, match="LossScaleOptimizer"):
        model.fit(*data(me.rank), verbose=0)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@on_ranks(TENSORFLOW)
def test_xla_is_refused_with_a_sentence(me: Rank) -> None:
    model = compiled(sgd(), jit_compile=True)
    with pytest.raises(ConfigError, match="jit_compile=False"):
        model.fit(*data(me.rank), verbose=0)
    again = compiled(sgd(), jit_compile=True)
    said = Lines()
    logging.getLogger("gossip_hvd").addHandler(said)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.GossipCallback()]
    again.fit(*data(me.rank), verbose=0, callbacks=callbacks)
    logging.getLogger("gossip_hvd").removeHandler(said)
    assert again.jit_compile is False
    assert ["jit_compile is set to False" in line for line in said.lines] == [True]
    assert_nodes_agree(me, again)


@on_ranks(ONE_SCOPE)
def test_saved_models_know_nothing_of_us_and_load_distributed(me: Rank) -> None:
    model = trained(me, hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)))
    path = f"/tmp/gossip_hvd_test_{me.job}_{me.rank}.keras"
    model.save(path)
    plain = keras.saving.load_model(path)
    assert "gossip" not in vars(plain.optimizer)
    if me.rank == 0:
        program = (
            f"import sys, keras\nloaded = keras.saving.load_model({path!r})\n"
            "print(type(loaded.optimizer).__name__)\n"
            "assert not any('gossip_hvd' in name for name in sys.modules)"
        )
        elsewhere = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert elsewhere.stdout.strip() == "Adam", elsewhere.stderr

    assert int(plain.optimizer.iterations.numpy()) == 4
    again = hvd.load_model(path, method="gossip")
    assert again.optimizer.gossip.method.name == "gossip"
    x, y = data(me.rank)
    again.fit(x, y, batch_size=8, verbose=0)
    assert_nodes_agree(me, again)
    assert int(again.optimizer.iterations.numpy()) == 8


@on_ranks(ONE_SCOPE)
def test_state_from_before_the_wrapping_is_kept(me: Rank) -> None:
    optimizer = keras.optimizers.Adam(0.01)
    model = compiled(optimizer)
    x, y = data(0)
    model.fit(x, y, batch_size=8, verbose=0)
    velocity = [v.numpy().copy() for v in optimizer.variables]
    model.optimizer = hvd.DistributedOptimizer(optimizer)
    model.train_function = None
    for before, now in zip(velocity, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(before, now.numpy())
    model.fit(*data(me.rank), batch_size=8, verbose=0)
    assert_nodes_agree(me, model)
    assert int(optimizer.iterations.numpy()) == 8


@on_ranks(PAIRS)
def test_operations_on_plain_values(me: Rank) -> None:
    """They mean the world in both scopes, and give tensors back."""
    mean = hvd.allreduce(1.0 + me.rank)
    assert keras.ops.is_tensor(mean)
    assert mean.numpy().shape == ()
    assert float(mean) == 2.5
    ranks = np.arange(4)
    np.testing.assert_array_equal(hvd.allreduce([me.rank, 1], op=hvd.Sum), [6, 4])
    np.testing.assert_array_equal(hvd.allreduce([me.rank, 1], average=False), [6, 4])
    np.testing.assert_array_equal(hvd.allgather(np.full((1, 2), me.rank))[:, 0], ranks)
    np.testing.assert_array_equal(hvd.broadcast([me.rank], 3), [3])
    rows = hvd.reducescatter(np.full((8, 3), me.rank, "float32"), op=hvd.Sum)
    np.testing.assert_array_equal(rows, np.full((2, 3), 6))
    variable = keras.Variable(np.full(2, me.rank, "float32"))
    np.testing.assert_array_equal(hvd.allreduce(variable), [1.5, 1.5])


@on_ranks(on(BOTH, [Job(2, "node", 2)]))
def test_what_has_no_meaning_is_refused_by_name(me: Rank) -> None:
    def wrap(**arguments):
        return hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **arguments)

    with pytest.raises(ConfigError, match="process_set"):
        wrap(process_set=hvd.ProcessSet([0]))
    with pytest.raises(ConfigError, match="op="):
        wrap(op=hvd.Adasum)
    with pytest.raises(ValueError, match="gradient_predivide_factor"):
        wrap(op=hvd.Sum, gradient_predivide_factor=2.0)
    with pytest.raises(ValueError, match="backward_passes_per_step"):
        wrap(backward_passes_per_step=0)
    with pytest.raises(ConfigError, match="did you mean 'crossover'"):
        wrap(method="crosover")
    with pytest.raises(ConfigError, match="optimizer of their own"):
        wrap().register_local_var(keras.Variable(0.0))
    with pytest.raises(ConfigError, match="wrap it once"):
        hvd.DistributedOptimizer(wrap())
