"""The methods on a real job: equal to Horovod, to the exact mean, to the memory transport."""

from __future__ import annotations

import horovod.torch as horovod
import numpy as np
import pytest
import torch
from academic import assert_as_academic, assert_nodes_equal, batch, mlp, plain, sgd, vector
from rank import Rank
from ranks import ALL, BOTH_SCOPES, ODD, PAIRS, UNEVEN, Job, on_ranks

import gossip_hvd.torch as hvd
from gossip_hvd.node import Cluster
from gossip_hvd.simulate import Simulation

VARIANTS = (
    {"method": "crossover"},
    {"method": "crossover", "peers": "uniform", "segments": 3},
    {"method": "crossover", "peers": "shift", "segments": "one"},
    {"method": "crossover", "peers": "unfair"},
    {"method": "crossover", "timing": "awc"},
    {"method": "crossover", "timing": "awc", "staleness": 2},
    {"method": "crossover", "wire_dtype": "bfloat16", "chunk_bytes": 64},
    {"method": "crossover", "timing": "awc", "wire_dtype": "float16"},
    {"method": "gossip"},
    {"method": "gossip", "topology": "ring", "timing": "awc"},
    {"method": "allreduce"},
    {"method": "allreduce", "segments": 5},
)


@on_ranks(ALL)
def test_ranks_of_a_node_hold_the_same_bits(me: Rank) -> None:
    for options in VARIANTS:
        model = mlp(torch.float32)
        optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **options)
        for step in range(4):
            plain(model, optimizer, *batch(me.rank, step, torch.float32, 5, 3))
            assert_nodes_equal(me, model)
        optimizer.gossip.drain()
        assert_nodes_equal(me, model)
        assert torch.isfinite(vector(model)).all()
        momenta = [optimizer.state[p]["momentum_buffer"].tolist() for p in model.parameters()]
        everyone = me.gather(momenta)
        assert all(everyone[r] == everyone[ranks[0]] for ranks in me.nodes for r in ranks), options
        rounds = me.gather(optimizer.gossip.round)
        assert len(set(rounds)) == 1, (options, rounds)


@on_ranks([Job(1), *PAIRS, *ODD, *UNEVEN])
def test_mixing_keeps_the_mean_and_contracts(me: Rank) -> None:
    for options in VARIANTS:
        if options["method"] == "allreduce" or options.get("peers") == "unfair":
            continue
        model = mlp(torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(me.node)))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters(), **options
        )
        leaders = [ranks[0] for ranks in me.nodes]
        before = torch.stack(me.gather(vector(model)))[leaders]
        start = optimizer.gossip.consensus_distance()
        for step in range(20):
            plain(model, optimizer, *batch(me.rank, step, torch.float64, 5, 3))
        optimizer.gossip.drain()
        after = torch.stack(me.gather(vector(model)))[leaders]
        # A wire of 16 bits rounds what travels; its difference form keeps the mean all the same.
        torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-12, atol=1e-12)
        end = optimizer.gossip.consensus_distance()
        exact = "wire_dtype" not in options
        assert end <= start * (0.05 if exact else 0.1), (options, start, end)
        assert (start > 0) == (len(me.nodes) > 1)


@on_ranks(PAIRS)
def test_two_nodes_meet_in_the_exact_mean(me: Rank) -> None:
    for segments in ("blocks", "one", 4):
        for peers in ("fair", "uniform", "shift"):
            model = mlp(torch.float32)
            optimizer = hvd.DistributedOptimizer(
                sgd(model), model.named_parameters(), segments=segments, peers=peers
            )
            own: list[torch.Tensor] = []
            # Runs before the hook that gossips: what this node has stepped to.
            optimizer.gossip  # noqa: B018
            optimizer._optimizer_step_post_hooks.move_to_end(
                optimizer.register_step_post_hook(
                    lambda *_, m=model, o=own: o.append(vector(m))
                ).id,
                last=False,
            )
            for step in range(3):
                plain(model, optimizer, *batch(me.rank, step, torch.float32, 5, 3))
                stepped = me.gather(own[-1].float())
                mean = (stepped[me.nodes[0][0]] + stepped[me.nodes[1][0]]) * 0.5
                assert not torch.equal(stepped[me.nodes[0][0]], stepped[me.nodes[1][0]])
                assert torch.equal(vector(model).float(), mean)


@on_ranks([Job(1), *PAIRS, Job(5, "node", 3)])
def test_training_is_as_the_academic_version(me: Rank) -> None:
    uneven = len({len(ranks) for ranks in me.nodes}) > 1
    assert_as_academic(me, steps=6, methods=["allreduce"] if uneven else ["allreduce", "crossover"])


@on_ranks([Job(5, "node", 3), Job(5, "world", 3)])
def test_uneven_nodes_follow_the_mean_over_ranks(me: Rank) -> None:
    # Without momentum or decay, one step from equal weights is the step of the mean gradient.
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    model, replica = mlp(), mlp()
    optimizer = hvd.DistributedOptimizer(make(model), model.named_parameters())
    plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
    data = [batch(rank, 0, torch.float64, 5, 3) for rank in range(me.size)]
    plain(replica, make(replica), torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    torch.testing.assert_close(vector(model), vector(replica), rtol=1e-12, atol=1e-12)


def horovods(
    me: Rank, dtype: torch.dtype, steps: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and momentum after training with Horovod's own DistributedOptimizer."""
    hvd.init(horovod_scope="world", node_size=me.size)
    model = mlp(dtype)
    optimizer = horovod.DistributedOptimizer(sgd(model), model.named_parameters())
    for step in range(steps):
        plain(model, optimizer, *batch(me.rank, step, dtype, 5, 3))
    hvd.shutdown()
    return outcome(model, optimizer)


def outcome(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    parameters = list(model.parameters())
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]
    return [p.detach().clone() for p in parameters], momenta


@on_ranks([Job(2), Job(4, "node", 2), Job(5, "node", 2)], bare=True)
def test_allreduce_equals_horovods_own_optimizer(me: Rank) -> None:
    for dtype, close in ((torch.float32, 3e-6), (torch.float64, 1e-13)):
        expected = horovods(me, dtype, steps=50)
        assert max(float(t.abs().max()) for t in expected[1]) > 1e-2, "nothing was learned"
        for scope in ("node", "world"):
            hvd.init(horovod_scope=scope, node_size=me.job.node_size)
            model = mlp(dtype)
            optimizer = hvd.DistributedOptimizer(
                sgd(model), model.named_parameters(), method="allreduce"
            )
            for step in range(50):
                plain(model, optimizer, *batch(me.rank, step, dtype, 5, 3))
            for mine, theirs in zip(outcome(model, optimizer), expected, strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(a, b, rtol=close, atol=close)
            bits = me.gather(vector(model))
            assert all(torch.equal(bits[0], other) for other in bits)
            hvd.shutdown()


SIMULATED = tuple(
    {"method": method, "timing": timing, "wire_dtype": wire, **more}
    for method, more in (
        ("crossover", {"segments": 5}),
        ("crossover", {"peers": "shift", "chunk_bytes": 64}),
        ("gossip", {}),
        ("gossip", {"topology": "ring", "segments": "one"}),
    )
    for timing in ("atc", "awc")
    for wire in (None, "bfloat16", "float16")
)


@on_ranks(
    [
        Job(1),
        Job(2),
        Job(4),
        Job(5),
        Job(5, "world"),
        Job(4, "node", 2),
        Job(4, "world", 2),
        *UNEVEN[:2],
    ]
)
def test_mpi_equals_the_memory_transport_bit_for_bit(me: Rank) -> None:
    for number, options in enumerate(SIMULATED):
        model = mlp(torch.float32)
        # A power of two keeps torch's fused multiply-add from rounding otherwise than NumPy.
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.25),
            model.named_parameters(),
            seed=9,
            **options,
        )
        gossip = optimizer.gossip
        layout, parameters = gossip.layout, dict(model.named_parameters())

        def flat(values: dict[str, torch.Tensor], layout=layout) -> np.ndarray:
            out = np.zeros(layout.nbytes // 4, np.float32)
            for field, start in zip(layout.fields, layout.offsets, strict=True):
                out[start // 4 : start // 4 + field.size] = values[field.name].numpy().reshape(-1)
            return out

        def factors(rank: int, step: int, parameters=parameters) -> dict[str, torch.Tensor]:
            random = torch.Generator().manual_seed(100 * step + rank)
            return {n: torch.randn(p.shape, generator=random) for n, p in parameters.items()}

        cluster = Cluster(tuple(tuple(ranks) for ranks in me.nodes))
        simulation = Simulation(
            cluster,
            gossip.method,
            layout,
            seed=9,
            order=number,
            timing=options["timing"],
            wire_dtype=options["wire_dtype"],
            largest=gossip.options.largest,
        )
        start = flat({n: p.detach() for n, p in parameters.items()})
        simulation.fill(np.stack([start] * len(me.nodes)))
        for step in range(5):
            optimizer.zero_grad()
            mine = factors(me.rank, step)
            sum((p * mine[n] * p).sum() for n, p in parameters.items()).backward()
            optimizer.step()

            def update(node: int, values: np.ndarray, step=step, cluster=cluster) -> None:
                ranks = cluster.nodes[node]
                scale = np.float32(cluster.gradient_scale(node))
                gradients = [2 * (flat(factors(r, step)) * values) * scale for r in ranks]
                mean = gradients[0]
                if len(ranks) == 2:
                    mean = (gradients[0] + gradients[1]) * np.float32(0.5)
                values -= np.float32(0.25) * mean

            simulation.step(update)
            real = flat({n: p.detach() for n, p in parameters.items()})
            assert np.array_equal(real, simulation.values(me.rank)), (options, step)
        gossip.drain()
        simulation.drain()
        real = flat({n: p.detach() for n, p in parameters.items()})
        assert np.array_equal(real, simulation.values(me.rank)), options
        assert simulation.board.idle()
        changed = not np.array_equal(real, start)
        assert changed


@on_ranks([Job(4), *BOTH_SCOPES])
def test_bytes_are_counted_and_every_rank_carries_its_share(me: Rank) -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), segments=4
    )
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert optimizer.gossip.bytes_sent == 64 * 64 * 4 // len(me.nodes[me.node])


@on_ranks([Job(1), *BOTH_SCOPES, Job(5, "node", 2)])
def test_one_inf_on_one_rank_makes_its_node_skip_and_nobody_hang(me: Rank) -> None:
    cases = [
        (zero, options)
        for zero in ("optimizer", "model")
        for options in (
            {"method": "crossover"},
            {"method": "crossover", "timing": "awc"},
            {"method": "gossip"},
            {"method": "allreduce"},
        )
    ]
    for zero, options in cases:
        model = mlp(torch.float32)
        optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        stepped: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(lambda *_, s=stepped: s.append(torch.ones(1)))
        for step in range(6):
            (optimizer if zero == "optimizer" else model).zero_grad()
            x, y = batch(me.rank, step, torch.float32, 5, 3)
            loss = (model(x) - y).square().mean()
            # The last step too, so that nothing but the end of training can pay for it.
            if step in (2, 5) and me.rank == 0:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        hit = options["method"] == "allreduce" or me.node == me.nodes.index(me.nodes[0])
        assert len(stepped) == (4 if hit else 6), (options, len(stepped))
        assert scaler.get_scale() == (2.0 if hit else 8.0)
        optimizer.gossip.average_parameters()
        assert torch.isfinite(vector(model)).all()
        rounds = me.gather(optimizer.gossip.round)
        busy = len(me.nodes) > 1 and options["method"] != "allreduce"
        assert set(rounds) == ({6} if busy else set(rounds[:1])), (options, rounds)
        bits = me.gather(vector(model))
        assert all(torch.equal(bits[0], other) for other in bits)


@on_ranks(BOTH_SCOPES)
def test_a_round_still_owed_at_the_end_is_run_by_shutdown(me: Rank) -> None:
    model = mlp(torch.float32)
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
    plain(model, optimizer, *batch(me.rank, 0, torch.float32, 5, 3))
    optimizer.zero_grad()
    x, y = batch(me.rank, 1, torch.float32, 5, 3)
    (model(x) - y).square().mean().backward()
    if me.node == 1:
        optimizer.step()
    hvd.shutdown()
    assert optimizer.gossip.round == 2
    bits = me.gather(vector(model))
    assert all(torch.equal(bits[0], other) for other in bits)


@on_ranks([Job(4)])
def test_methods_are_chosen_by_argument_or_environment(me: Rank) -> None:
    names = []
    with pytest.MonkeyPatch.context() as patch:
        for environment, argument in ((None, None), ("gossip", None), ("gossip", "allreduce")):
            if environment:
                patch.setenv("GOSSIP_HVD_METHOD", environment)
            model = mlp()
            optimizer = hvd.DistributedOptimizer(sgd(model), method=argument)
            names.append(optimizer.gossip.method.name)
    assert names == ["crossover", "gossip", "allreduce"]


@on_ranks([Job(4), Job(5)])
def test_seeds_decide_who_meets_whom(me: Rank) -> None:
    def trained(**options: object) -> list[float]:
        model = mlp(torch.float32)
        optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **options)
        for step in range(3):
            plain(model, optimizer, *batch(me.rank, step, torch.float32, 5, 3))
        return vector(model).tolist()

    assert trained(seed=4) == trained(seed=4)
    assert any(me.gather(trained(seed=4) != trained(seed=5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSIP_HVD_SEED", "5")
        assert trained() == trained(seed=5)
