"""TensorFlow proper on real ranks: world operations in both scopes, the tape, custom loops."""

from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError
from keras_models import CLASSES, assert_nodes_agree, data, differ, network, values
from rank import Rank
from ranks import ALONE, BOTH_SCOPES, Job, on_ranks

import gossip_hvd.tensorflow as hvd
from gossip_hvd import session
from gossip_hvd.errors import ConfigError, OperationError
from gossip_hvd.joining import TAIL

PAIRS = [replace(job, adapter="tensorflow") for job in BOTH_SCOPES]
SOME = [replace(job, adapter="tensorflow") for job in [*ALONE, Job(2), Job(5, "node", 2)]]
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def both_ways(function):
    """A function, and the same in a graph."""
    return [function, tf.function(function)]


@on_ranks([*PAIRS, *SOME])
def test_reductions_over_the_world(me: Rank) -> None:
    mine = tf.constant([1.0 + me.rank, 2.0])
    ranks = np.arange(me.size) + 1.0
    for kind, wanted in (
        (hvd.Average, [ranks.mean(), 2]),
        (hvd.Sum, [ranks.sum(), 2 * me.size]),
        (hvd.Min, [1, 2]),
        (hvd.Max, [me.size, 2]),
        (hvd.Product, [ranks.prod(), 2.0**me.size]),
    ):
        for reduce in both_ways(lambda x, kind=kind: hvd.allreduce(x, op=kind)):
            np.testing.assert_allclose(reduce(mine), wanted, rtol=1e-6)
    for dtype in (tf.float16, tf.float64, tf.int32, tf.int64):
        result = hvd.allreduce(tf.cast(mine, dtype), op=hvd.Sum)
        assert result.dtype == dtype
        np.testing.assert_allclose(tf.cast(result, tf.float64), [ranks.sum(), 2 * me.size])
    pair = hvd.grouped_allreduce([mine, mine * 2], op=hvd.Sum, prescale_factor=2.0)
    np.testing.assert_allclose(pair[1], [4 * ranks.sum(), 8 * me.size])
    small = hvd.allreduce(mine, compression=hvd.Compression.fp16)
    np.testing.assert_allclose(small, [ranks.mean(), 2], rtol=1e-3)


@on_ranks([*PAIRS, *SOME])
def test_gathers_broadcasts_and_exchanges(me: Rank) -> None:
    rows = tf.fill([me.rank + 1, 2], float(me.rank))
    wanted = np.repeat(np.arange(me.size), np.arange(me.size) + 1)
    for gather in both_ways(hvd.allgather):
        np.testing.assert_array_equal(gather(rows)[:, 0], wanted)
    root = me.size - 1
    for send in both_ways(lambda x: hvd.broadcast(x, root)):
        np.testing.assert_array_equal(send(tf.constant([float(me.rank)])), [root])
    each = tf.range(me.size) + 100 * me.rank
    np.testing.assert_array_equal(hvd.alltoall(each), me.rank + 100 * np.arange(me.size))
    mine = hvd.reducescatter(tf.ones([me.size * 2, 3]) * (me.rank + 1), op=hvd.Sum)
    np.testing.assert_array_equal(mine, np.full((2, 3), sum(range(me.size + 1))))
    pair = hvd.grouped_reducescatter([tf.ones([me.size]), tf.ones([me.size, 2])], op=hvd.Sum)
    np.testing.assert_array_equal(pair[1], np.full((1, 2), me.size))
    assert hvd.broadcast_object({"from": me.rank}, root) == {"from": root}
    assert hvd.broadcast_object_fn(root)({"from": me.rank}) == {"from": root}
    assert hvd.allgather_object(me.rank) == list(range(me.size))
    hvd.barrier()


@on_ranks(PAIRS)
def test_single_numbers_stay_single_numbers(me: Rank) -> None:
    for reduce in both_ways(lambda x: hvd.allreduce(x, op=hvd.Sum)):
        total = reduce(tf.constant(1.0 + me.rank))
        assert total.shape == ()
        assert float(total) == 10.0
    assert hvd.broadcast(tf.constant(me.rank), 3).shape == ()


@on_ranks(PAIRS)
def test_ranks_that_name_tensors_differently_meet_in_a_graph(me: Rank) -> None:
    mine = tf.constant([1.0 + me.rank], name=f"rank{me.rank}")

    @tf.function
    def step():
        with tf.name_scope(f"scope{me.rank}"):
            total = hvd.allreduce(tf.identity(mine, name=f"x{me.rank}"), op=hvd.Sum)
            rows = hvd.allgather(tf.identity(mine, name=f"y{me.rank}"))
            return total, rows, hvd.broadcast(tf.identity(mine, name=f"z{me.rank}"), 2)

    total, rows, third = step()
    np.testing.assert_array_equal(total, [10])
    np.testing.assert_array_equal(rows, [1, 2, 3, 4])
    np.testing.assert_array_equal(third, [3])


@on_ranks(PAIRS)
def test_a_rank_that_traces_once_more_meets_the_others(me: Rank) -> None:
    @tf.function
    def step(batch):
        return hvd.allreduce(tf.reduce_sum(batch), op=hvd.Sum)

    assert float(step(tf.ones([2]))) == 2 * me.size
    # The last batch of one rank is larger: only it traces again.
    assert float(step(tf.ones([2 + (me.rank == 1)]))) == 2 * me.size + 1
    assert float(step(tf.ones([2]))) == 2 * me.size


@on_ranks(PAIRS)
def test_complex_gradients_are_averaged_whole(me: Rank) -> None:
    variable = tf.Variable(tf.constant([1 + 2j, 3 - 1j], tf.complex64))

    def gradient(wrap):
        with tf.GradientTape() as tape:
            factors = tf.constant([1j * me.rank, 2 + me.rank], tf.complex64)
            loss = tf.math.real(tf.reduce_sum(variable * factors))
        return wrap(tape).gradient(loss, [variable])[0].numpy()

    every = me.gather(gradient(lambda tape: tape))
    mine = next(ranks for ranks in me.nodes if me.rank in ranks)
    found = gradient(lambda tape: hvd.DistributedGradientTape(tape, method="none"))
    np.testing.assert_allclose(found, np.mean([every[rank] for rank in mine], axis=0))
    assert np.abs(found.imag).max() > 0


@on_ranks(PAIRS)
def test_who_is_who_in_a_graph(me: Rank) -> None:
    asked = tf.function(lambda: [hvd.rank_op(), hvd.size_op(), hvd.process_set_included_op()])()
    assert [int(number) for number in asked] == [me.rank, me.size, 1]
    assert (int(hvd.local_rank_op()), int(hvd.local_size_op())) == (me.rank, me.size)
    assert hvd.is_homogeneous()


@on_ranks(PAIRS)
def test_numpys_numbers_are_numbers(me: Rank) -> None:
    factors = {"prescale_factor": np.float32(0.5), "postscale_factor": np.float64(4)}
    mine = tf.constant([float(me.rank)])
    total = hvd.allreduce(mine, op=hvd.Sum, **factors)
    np.testing.assert_array_equal(total, [2.0 * sum(range(me.size))])
    np.testing.assert_array_equal(hvd.broadcast(mine, np.int64(2)), [2.0])


@on_ranks([PAIRS[0]])
def test_who_has_joined_is_not_waited_for(me: Rank) -> None:
    if me.rank == 1:
        np.testing.assert_array_equal(hvd.allreduce(tf.ones([1]), op=hvd.Sum), [1.0])
    assert hvd.join() == 1


@on_ranks([PAIRS[0]])
def test_process_sets_are_for_scope_world(me: Rank) -> None:
    some = hvd.ProcessSet([0, 1])
    with pytest.raises(ConfigError, match="horovod_scope='world'"):
        hvd.add_process_set(some)
    with pytest.raises(ConfigError, match="horovod_scope='world'"):
        hvd.allreduce(tf.ones([1]), process_set=some)


@on_ranks([PAIRS[1]], bare=True)
def test_process_sets_come_and_go_in_scope_world(me: Rank) -> None:
    hvd.init(horovod_scope="world", node_size=2, process_sets="dynamic")
    some = hvd.add_process_set([1, 2])
    included = me.rank in (1, 2)
    assert int(hvd.process_set_included_op(some.process_set_id)) == included
    if included:
        total = hvd.allreduce(tf.constant([float(me.rank)]), op=hvd.Sum, process_set=some)
        np.testing.assert_array_equal(total, [3.0])
    with pytest.raises(ConfigError, match="all ranks take part"):
        hvd.broadcast_object(0, process_set=some)
    assert hvd.remove_process_set(some)


@on_ranks(PAIRS)
def test_keras_variables_are_tensors_too(me: Rank) -> None:
    variable = keras.Variable(np.full(3, float(me.rank), "float32"))
    np.testing.assert_allclose(hvd.allreduce(variable), np.full(3, 1.5))
    hvd.broadcast_variables([variable], root_rank=2)
    np.testing.assert_array_equal(variable.numpy(), np.full(3, 2.0))
    model = network()
    model.set_weights([w + me.rank for w in model.get_weights()])
    wanted = me.gather(values(model))[1]
    hvd.broadcast_variables(model.variables, root_rank=1)
    np.testing.assert_array_equal(values(model), wanted)
    plain = tf.Variable([float(me.rank)])
    hvd.broadcast_([plain], root_rank=3)
    np.testing.assert_array_equal(plain.numpy(), [3.0])


@on_ranks(PAIRS)
def test_variables_are_broadcast_inside_a_graph(me: Rank) -> None:
    """As Horovod's own TensorFlow 2 example does it, behind the first update."""
    model = network()
    model.set_weights([w + me.rank for w in model.get_weights()])
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    x, y = data(me.rank)

    @tf.function
    def step(images, labels, first: bool):
        with tf.GradientTape() as tape:
            loss = LOSS(labels, model(images, training=True))
        tape = hvd.DistributedGradientTape(tape, timing="awc")
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        if first:
            hvd.broadcast_variables(model.variables, root_rank=0)
            hvd.broadcast_variables(optimizer.variables, root_rank=0)

    step(tf.constant(x[:8]), tf.constant(y[:8]), True)
    assert not differ(me.gather(values(model)))
    step(tf.constant(x[8:16]), tf.constant(y[8:16]), False)
    hvd.gossip_of(model.trainable_variables).drain()
    assert_nodes_agree(me, model)


@on_ranks(PAIRS)
def test_gradients_flow_as_horovods_do(me: Rank) -> None:
    x = tf.Variable([1.0 + me.rank, 2.0])
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(hvd.allreduce(x, op=hvd.Sum) * (me.rank + 1.0))
    np.testing.assert_allclose(tape.gradient(y, x), [10.0, 10.0])
    rows = tf.Variable(tf.ones([me.rank + 1, 2]))
    with tf.GradientTape() as tape:
        z = tf.reduce_sum(hvd.allgather(rows.read_value()) * (me.rank + 1.0))
    np.testing.assert_allclose(tape.gradient(z, rows), np.full((me.rank + 1, 2), 2.5))
    with tf.GradientTape() as tape:
        w = tf.reduce_sum(hvd.broadcast(x.read_value(), 2) * (me.rank + 1.0))
    np.testing.assert_allclose(tape.gradient(w, x), [2.5 if me.rank == 2 else 0.0] * 2)


@on_ranks(PAIRS)
def test_gradients_in_a_graph_meet_on_ranks_that_have_built_other_things(me: Rank) -> None:
    for _ in range(3 * me.rank):
        tf.function(lambda: tf.ones([2]) + tf.ones([2]))()
    # What a graph captures is named by a counter of the process, gradients of it likewise.
    x, upstream = tf.ones([me.size, 2]), tf.fill([me.size, 2], 2.0)

    def gradient(operation):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = operation(x)
        return tape.gradient(y, x, upstream)

    for operation, wanted in (
        (lambda t: hvd.allreduce(t, op=hvd.Average), 2.0),
        (lambda t: hvd.grouped_allreduce([t, 2 * t], op=hvd.Sum)[0], 2.0 * me.size),
        (lambda t: hvd.broadcast(t, 1), 2.0 if me.rank == 1 else 0.0),
        (hvd.alltoall, 2.0),
        (lambda t: hvd.allgather(t)[: me.size], 2.0 if me.rank == 0 else 0.0),
    ):
        found = tf.function(lambda operation=operation: gradient(operation))()
        np.testing.assert_allclose(found, np.full((me.size, 2), wanted), rtol=1e-6)


@on_ranks(PAIRS)
def test_rows_that_travel_carry_gradients_back(me: Rank) -> None:
    """Rank r sends r + 1 rows to each; what comes back is weighed by where it was."""
    size, mine = me.size, (me.rank + 1) * me.size
    splits = tf.fill([size], me.rank + 1)

    def exchange(rows):
        with tf.GradientTape() as tape:
            tape.watch(rows)
            found, received = hvd.alltoall(rows, splits)
            total = tf.reduce_sum(found * (me.rank + 1.0))
        return received, tape.gradient(total, rows)

    for run in both_ways(exchange):
        received, gradient = run(tf.ones([mine, 2]))
        np.testing.assert_array_equal(received, np.arange(size) + 1)
        wanted = np.repeat(np.arange(size) + 1.0, me.rank + 1)
        np.testing.assert_array_equal(gradient[:, 0], wanted)

    def reduce(rows, op):
        with tf.GradientTape() as tape:
            tape.watch(rows)
            total = tf.reduce_sum(hvd.reducescatter(rows, op=op) * (me.rank + 1.0))
        return tape.gradient(total, rows)

    for op, factor in ((hvd.Average, 1), (hvd.Sum, size)):
        for run in both_ways(lambda rows, op=op: reduce(rows, op)):
            gradient = run(tf.ones([2 * size, 3]))[:, 0]
            np.testing.assert_allclose(gradient, factor * np.repeat(np.arange(size) + 1.0, 2))


@on_ranks(PAIRS)
def test_sparse_slices(me: Rank) -> None:
    slices = tf.IndexedSlices(tf.ones([1, 2]) * me.rank, tf.constant([me.rank % 2]), [2, 2])
    total = tf.convert_to_tensor(hvd.allreduce(slices, op=hvd.Sum))
    np.testing.assert_array_equal(total, [[2, 2], [4, 4]])
    mean, dense = hvd.grouped_allreduce([slices, tf.ones([3]) * me.rank], name="mixed")
    np.testing.assert_array_equal(tf.convert_to_tensor(mean), [[0.5, 0.5], [1, 1]])
    np.testing.assert_array_equal(dense, [1.5] * 3)
    with pytest.raises(NotImplementedError, match="Only Sum and Average"):
        hvd.allreduce(slices, op=hvd.Max)
    with pytest.raises(NotImplementedError, match="scale_factor are not supported"):
        hvd.allreduce(slices, op=hvd.Sum, prescale_factor=2.0)


@on_ranks([PAIRS[0]])
def test_what_fails_fails_with_horovods_error(me: Rank) -> None:
    with pytest.raises(HorovodInternalError, match=r"(?i)mismatched"):
        hvd.allreduce(tf.ones([1 + me.rank]), name="apart")
    operations = session.current().operations
    if me.rank:
        with pytest.raises(OperationError):
            name, values = operations.next_name("barrier"), [np.zeros(1, np.float32)]
            operations.submit("allgather", name, values, [(1,)]).wait()
    else:
        with pytest.raises(HorovodInternalError, match="Mismatched collective operations"):
            hvd.barrier()
    for _ in range(me.rank * (TAIL + 1)):
        operations.step("a model")
    me.settle()
    with pytest.raises(HorovodInternalError, match="cannot follow"):
        hvd.join()


def loop(me: Rank, optimizer, *, graph: bool, tape: bool, **options):
    """Horovod's own custom loop, 6 steps of 8 samples."""
    model = network()
    x, y = data(me.rank)

    def step(images, labels):
        with tf.GradientTape() as one:
            loss = LOSS(labels, model(images, training=True))
        if tape:
            one = hvd.DistributedGradientTape(one, **options)
        gradients = one.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    run = tf.function(step) if graph else step
    for i in range(6):
        rows = slice(8 * i % 32, 8 * i % 32 + 8)
        run(tf.constant(x[rows]), tf.constant(y[rows]))
    return model


@on_ranks(PAIRS)
def test_a_custom_loop_with_our_optimizer(me: Rank) -> None:
    results = []
    for graph in (True, False):
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), use_locking=True)
        model = loop(me, optimizer, graph=graph, tape=False)
        nodes = assert_nodes_agree(me, model)
        assert not differ(nodes)
        assert optimizer.gossip.round == 6
        results.append(values(model))
    np.testing.assert_allclose(*results, atol=1e-6)


@on_ranks(PAIRS)
def test_a_custom_loop_with_the_tape(me: Rank) -> None:
    for graph in (True, False):
        model = loop(me, keras.optimizers.Adam(0.01), graph=graph, tape=True)
        nodes = assert_nodes_agree(me, model)
        assert differ(nodes)  # the last update has not been mixed yet
        hvd.average_variables(model.trainable_variables)
        assert not differ(me.gather(values(model)))


@on_ranks(PAIRS)
def test_the_tape_mixes_between_gradient_and_update(me: Rank) -> None:
    """Two nodes: x ← (x₀ + x₁) / 2 − γ g(x), by hand."""
    model = loop(me, keras.optimizers.SGD(0.1), graph=True, tape=True)
    nodes = [network().get_weights() for _ in me.nodes]
    parts = [data(rank) for rank in range(me.size)]
    other = network()
    for i in range(6):
        rows = slice(8 * i % 32, 8 * i % 32 + 8)
        gradients = []
        for weights, ranks in zip(nodes, me.nodes, strict=True):
            other.set_weights(weights)
            every = []
            for rank in ranks:
                x, y = parts[rank]
                with tf.GradientTape() as tape:
                    loss = LOSS(y[rows], other(x[rows]))
                every.append([g.numpy() for g in tape.gradient(loss, other.trainable_variables)])
            gradients.append([np.mean(g, axis=0) for g in zip(*every, strict=True)])
        mean = [np.mean(w, axis=0) for w in zip(*nodes, strict=True)]
        nodes = [[m - 0.1 * g for m, g in zip(mean, gs, strict=True)] for gs in gradients]
    wanted = np.concatenate([w.ravel() for w in nodes[me.node]])
    np.testing.assert_allclose(values(model), wanted, atol=2e-6)


@on_ranks(PAIRS)
def test_the_tape_with_allreduce_and_with_overlap(me: Rank) -> None:
    model = loop(me, keras.optimizers.SGD(0.1), graph=True, tape=True, method="allreduce")
    assert not differ(assert_nodes_agree(me, model))
    model = loop(me, keras.optimizers.SGD(0.1), graph=True, tape=True, timing="awc")
    assert_nodes_agree(me, model)


@on_ranks(PAIRS)
def test_tape_and_optimizer_together_are_refused(me: Rank) -> None:
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    with pytest.raises(ConfigError, match="Use one of them"):
        loop(me, optimizer, graph=False, tape=True)


@on_ranks([PAIRS[0]])
def test_a_tape_refuses_methods_that_must_see_more(me: Rank) -> None:
    for method in ("slowmo", "gossip_aga", "averaged_momentum"):
        with pytest.raises(ConfigError, match="a tape sees none of them"):
            hvd.DistributedGradientTape(tf.GradientTape(), method=method)


@on_ranks([PAIRS[0]])
def test_what_does_not_exist_here_says_what_does(me: Rank) -> None:
    for name in (
        "broadcast_global_variables",
        "BroadcastGlobalVariablesHook",
        "PartialDistributedGradientTape",
        "SyncBatchNormalization",
    ):
        with pytest.raises(ConfigError, match=name):
            getattr(hvd, name)(0)
    with pytest.raises(ConfigError, match="optimizer of TensorFlow 1"):
        hvd.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(0.1))
    with pytest.raises(AttributeError):
        hvd.no_such_name  # noqa: B018
    assert CLASSES == 3
