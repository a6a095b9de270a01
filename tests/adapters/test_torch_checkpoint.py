"""Checkpoints on a real job: one verdict for all ranks, each rank's own, the framework's ways."""

from __future__ import annotations

import copy
import io
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from academic import batch, mlp, plain, sgd
from rank import Rank
from ranks import Job, on_ranks

import gossip_hvd.torch as hvd

JOBS = [Job(4), Job(4, "node", 2)]
FLYING = {"method": "ceca", "timing": "awc"}
"""A method with an array of its own, and an exchange in flight."""


@contextmanager
def directory(me: Rank) -> Iterator[Path]:
    """One for all ranks."""
    path = Path(me.gather(tempfile.mkdtemp())[0])
    try:
        yield path
        me.settle()
    finally:
        shutil.rmtree(path, ignore_errors=True)


def made(**options: Any) -> tuple[torch.nn.Module, Any]:
    model = mlp(torch.float32)
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **options)
    return model, optimizer


def train(me: Rank, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        plain(model, optimizer, *batch(me.rank, step, torch.float32, 5, 3))


def bits(model: Any, optimizer: Any) -> list[Any]:
    optimizer.gossip.drain()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return [t.detach().clone() for t in (*model.parameters(), *momenta)]


def error_on_all(me: Rank, message: str, action: Any) -> None:
    with pytest.raises(hvd.CheckpointError, match=message) as caught:
        action()
    assert len(set(me.gather(str(caught.value)))) == 1, "every rank raises the same"


@on_ranks(JOBS)
def test_a_state_taken_in_mid_flight_goes_through_torch_save(me: Rank) -> None:
    model, optimizer = made(**FLYING)
    train(me, model, optimizer, range(4))
    assert optimizer.gossip.engine.in_flight
    file = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "gossip": optimizer.gossip}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    train(me, model, optimizer, range(4, 8))
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, again = made(**FLYING)
    train(me, other, again, range(1))
    other.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    again.gossip.load_state_dict(state["gossip"])
    assert again.gossip.round == 4
    train(me, other, again, range(4, 8))
    pairs = zip(bits(model, optimizer), bits(other, again), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@on_ranks(JOBS)
def test_taking_a_state_waits_for_nobody_and_changes_nothing(me: Rank) -> None:
    runs = []
    for curious in (False, True):
        model, optimizer = made(**FLYING)
        for step in range(6):
            train(me, model, optimizer, range(step, step + 1))
            if curious and me.rank == step % me.size:
                assert optimizer.gossip.state_dict()["in_flight"] is not None
        runs.append(bits(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@on_ranks(JOBS)
def test_with_drain_nothing_is_left_in_flight(me: Rank) -> None:
    model, optimizer = made(**FLYING)
    train(me, model, optimizer, range(3))
    assert optimizer.gossip.state_dict(drain=True)["in_flight"] is None
    assert not optimizer.gossip.engine.in_flight


@on_ranks([Job(4)])
def test_with_staleness_the_exchange_is_landed_first(me: Rank) -> None:
    model, optimizer = made(method="crossover", timing="awc", staleness=1)
    train(me, model, optimizer, range(4))
    state = optimizer.gossip.state_dict()
    assert state["in_flight"] is None
    assert set(me.gather(state["round"])) == {4}


@on_ranks(JOBS)
def test_a_state_that_does_not_fit_on_one_rank_is_refused_on_all(me: Rank) -> None:
    model, optimizer = made(**FLYING)
    train(me, model, optimizer, range(2))
    early = optimizer.gossip.state_dict()
    train(me, model, optimizer, range(2, 4))
    late, gossip = optimizer.gossip.state_dict(), optimizer.gossip
    last = me.rank == me.size - 1
    cases = {
        "rank 3: the saved state differs in its method: saved 'sgp'": {**late, "method": "sgp"},
        "rank 3: this is the state of rank 0, loaded by rank 3": {**late, "rank": 0},
        "rank 3 and rank 0 differ in the saved round: rank 3 has 2, rank 0 has 4": early,
        "rank 3: the saved arrays": {**late, "arrays": {"others": torch.zeros(3)}},
        "rank 3: a saved state is a dictionary": None,
    }
    for message, wrong in cases.items():
        error_on_all(me, message, lambda w=wrong: gossip.load_state_dict(w if last else late))
    gossip.load_state_dict(late)


@on_ranks(JOBS)
def test_a_rank_that_cannot_write_is_an_error_on_all_and_loses_nothing(me: Rank) -> None:
    model, optimizer = made(**FLYING)
    train(me, model, optimizer, range(2))
    with directory(me) as path:
        first = hvd.save_checkpoint(path, model=model, optimizer=optimizer)
        for full in range(me.size):  # also a rank that does not make its node's file
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            if me.rank == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
            try:
                own = {"only": torch.full((5000,), me.rank)}
                error_on_all(
                    me,
                    f"save_checkpoint: rank {full}: .*File too large",
                    lambda o=own: hvd.save_checkpoint(
                        path, model=model, optimizer=optimizer, extra=o
                    ),
                )
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            me.settle()
            assert [p.name for p in path.iterdir()] == [first.name], "nothing is left behind"
            me.settle()
        found = hvd.restore(path, model=model, optimizer=optimizer)
        assert found is not None
        assert found.path == first


@on_ranks(JOBS)
def test_state_that_is_not_plain_is_named_on_all_ranks(me: Rank) -> None:
    model, optimizer = made()
    with directory(me) as path:
        error_on_all(
            me,
            "rank 2: extra/what is a Job; only tensors, numbers",
            lambda: hvd.save_checkpoint(
                path, model=model, extra={"what": me.job if me.rank == 2 else 1}
            ),
        )
        assert not list(path.iterdir())
        assert hvd.restore(path, model=model, optimizer=optimizer) is None


@on_ranks(JOBS)
def test_all_nodes_go_on_from_the_same_checkpoint(me: Rank) -> None:
    """Each node on a disk of its own; the newest is damaged on one, the next missing on another."""
    model, optimizer = made(**FLYING)
    with directory(me) as path:
        mine = path / f"disk{me.node}"
        for step in range(4):
            train(me, model, optimizer, range(step, step + 1))
            saved = hvd.save_checkpoint(mine, model=model, optimizer=optimizer, extra=step, keep=9)
        assert [p.name for p in saved.iterdir() if "node" in p.name] == [
            f"node{me.node:04d}.safetensors"
        ]
        me.settle()
        if me.rank == me.nodes[1][0]:
            file = mine / "checkpoint-000003" / "node0001.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
        if me.rank == me.nodes[0][0]:
            shutil.rmtree(mine / "checkpoint-000002")
        me.settle()
        found = hvd.restore(mine, model=model, optimizer=optimizer)
        assert found is not None
        assert (found.path.name, found.extra) == ("checkpoint-000001", 1)
        assert optimizer.gossip.round == 2
        if me.rank == me.nodes[0][0]:
            shutil.rmtree(mine)
        me.settle()
        error_on_all_nodes = "(?s)no checkpoint in .* is whole. .*checkpoint-000003: on node 0.*"
        with pytest.raises(hvd.CheckpointError, match=error_on_all_nodes):
            hvd.restore(mine, model=model, optimizer=optimizer)


@on_ranks([Job(4, "node", 2)])
def test_what_differs_inside_a_node_is_saved_for_each_rank_and_the_rest_once(me: Rank) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 100), torch.nn.BatchNorm1d(100))
    optimizer = torch.optim.Adam(model.parameters())
    hvd.DistributedOptimizer(optimizer, model.named_parameters())
    torch.manual_seed(me.rank)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 40)).square().sum().backward()
        optimizer.step()
    own = {"name": f"rank {me.rank}", "same": torch.arange(7), "empty": torch.zeros(0, 3)}
    with directory(me) as path:
        file = hvd.save_checkpoint(path, model=model, optimizer=optimizer, extra=own)
        size = (file / f"node{me.node:04d}.safetensors").stat().st_size
        once = 3 * 4 * sum(p.numel() for p in model.parameters())
        assert once < size < once + 60_000, "weights and history of a node are written once"
        drawn = torch.rand(3)
        buffers = copy.deepcopy(dict(model.named_buffers()))
        torch.manual_seed(9)
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.zero_()
        found = hvd.restore(path, model=model, optimizer=optimizer)
    assert found is not None
    assert found.extra["name"] == own["name"]
    assert torch.equal(found.extra["same"], own["same"])
    assert torch.equal(found.extra["empty"], own["empty"])
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    means = me.gather(buffers["1.running_mean"])
    assert not torch.equal(means[0], means[1])


@on_ranks([Job(4, "node", 2)])
def test_equal_tensors_come_back_with_memory_of_their_own(me: Rank) -> None:
    model, optimizer = made()
    with directory(me) as path:
        zeros = [torch.zeros(50), torch.zeros(50)]
        hvd.save_checkpoint(path, model=model, optimizer=optimizer, extra=zeros)
        found = hvd.restore(path, model=model, optimizer=optimizer)
    assert found is not None
    found.extra[0].fill_(1)
    assert found.extra[1].sum() == 0


@on_ranks(JOBS)
def test_several_models_by_name_and_another_model_is_refused(me: Rank) -> None:
    pairs = {"g": made(), "d": made(method="gossip")}
    models = {name: model for name, (model, _) in pairs.items()}
    optimizers = {name: optimizer for name, (_, optimizer) in pairs.items()}
    for model, optimizer in pairs.values():
        train(me, model, optimizer, range(2))
    with directory(me) as path:
        hvd.save_checkpoint(path, model=models, optimizer=optimizers)
        found = hvd.restore(path, model=models, optimizer=optimizers)
        assert found is not None
        assert found.rounds == {"g": 2, "d": 2}
        other = torch.nn.Linear(2, 2)
        error_on_all(
            me,
            "(?s)saved model does not fit.*Missing",
            lambda: hvd.restore(path, model={"g": other}),
        )
        error_on_all(
            me,
            "it holds models .*'d', 'g'.*asked for are .'x'",
            lambda: hvd.restore(path, model={"x": other}),
        )
        # Another method goes on from the mean only.
        again, changed = made(method="gossip")
        both = {"model": {"g": again}, "optimizer": {"g": changed}}
        error_on_all(me, "differs in its method", lambda: hvd.restore(path, **both))
        found = hvd.restore(path, merge=True, **both)
        assert found is not None
        assert found.merged
        train(me, again, changed, range(2))
