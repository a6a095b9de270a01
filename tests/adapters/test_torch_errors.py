"""Bad input is one clear error on every rank, and the job can go on or end, but never hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from academic import batch, mlp, plain, sgd, vector
from rank import Rank
from ranks import ALONE, BOTH_SCOPES, Job, on_ranks

import gossip_hvd.torch as hvd

ODD_ONE = 2
"""The rank whose settings differ."""


def refused(me: Rank, make: Callable[[torch.nn.Module], Any]) -> str:
    """The one error that all ranks get."""
    with pytest.raises(hvd.ConfigError) as caught:
        make(mlp())
    said = str(caught.value)
    assert me.gather(said) == [said] * me.size, "ranks were told different things"
    return said


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    # what is different: (options of all, of the odd one, what the error names)
    "method": ({"method": "gossip"}, {"method": "crossover"}, ("method", "Gossip", "Crossover")),
    "peers": ({"peers": "fair"}, {"peers": "shift"}, ("method", "fair", "shift")),
    "topology": (
        {"method": "gossip", "topology": "ring"},
        {"method": "gossip", "topology": "one_peer_exponential"},
        ("method", "ring", "one_peer_exponential"),
    ),
    "seed": ({"seed": 4}, {"seed": 5}, ("engine options", "seed=4", "seed=5")),
    "timing": ({"timing": "atc"}, {"timing": "awc"}, ("engine options", "atc", "awc")),
    "wire_dtype": (
        {"wire_dtype": "float16"},
        {"wire_dtype": "bfloat16"},
        ("engine options", "bfloat16", "float16"),
    ),
    "chunk_bytes": ({}, {"chunk_bytes": 128}, ("engine options", "chunk_bytes=128")),
    "segments": ({"segments": 2}, {"segments": "one"}, ("segments", "2", "one")),
    "passes": ({}, {"backward_passes_per_step": 2}, ("reduction", "2")),
    "compression": ({}, {"compression": hvd.Compression.fp16}, ("reduction", "FP16")),
    "groups": ({}, {"num_groups": 2}, ("reduction", "groups")),
    "op": ({}, {"op": hvd.Sum}, ("reduction", "op")),
}


@on_ranks(BOTH_SCOPES)
def test_settings_that_differ_are_named(me: Rank) -> None:
    for what, (common, odd, names) in DIFFERENT.items():
        options = odd if me.rank == ODD_ONE else common
        said = refused(
            me, lambda m, o=options: hvd.DistributedOptimizer(sgd(m), m.named_parameters(), **o)
        )
        for name in (*names, f"rank {ODD_ONE} and rank 0 differ", "DistributedOptimizer"):
            assert name in said, (what, name, said)


@on_ranks(BOTH_SCOPES)
def test_models_that_differ_are_named(me: Rank) -> None:
    def larger(model: torch.nn.Module) -> torch.nn.Module:
        model[2] = torch.nn.Linear(6, 4).double()
        return model

    def renamed(model: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Identity(), *model)

    def frozen(model: torch.nn.Module) -> torch.nn.Module:
        model[0].weight.requires_grad_(False)
        return model

    def longer(model: torch.nn.Module) -> torch.nn.Module:
        return model.append(torch.nn.Linear(3, 3).double())

    cases = (
        (larger, ("parameter '2.weight'", "(4, 6)", "(3, 6)")),
        (lambda m: m.float(), ("parameter '0.weight'", "torch.float32", "torch.float64")),
        (renamed, ("parameter '0.weight'", "absent")),
        (frozen, ("parameter '0.weight'", "grad=False", "grad=True")),
        (longer, ("the number of parameters", "6", "4")),
    )
    for change, names in cases:
        model = change(mlp()) if me.rank == ODD_ONE else mlp()
        said = refused(
            me, lambda _, m=model: hvd.DistributedOptimizer(sgd(m), m.named_parameters())
        )
        for name in (*names, f"rank {ODD_ONE} and rank 0 differ"):
            assert name in said, (name, said)


@on_ranks(BOTH_SCOPES)
def test_parameters_that_differ_are_named_by_broadcast_parameters(me: Rank) -> None:
    model = torch.nn.Linear(5, 3 if me.rank == ODD_ONE else 2)
    said = refused(me, lambda _: hvd.broadcast_parameters(model.state_dict(), root_rank=0))
    for name in ("broadcast_parameters", "rank 2 and rank 0 differ", "(3,)", "(2,)"):
        assert name in said, said


@on_ranks([Job(4)], bare=True)
def test_settings_of_init_that_differ_are_named(me: Rank) -> None:
    cases: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
        ({"node_size": 1}, {"node_size": 2}, "node_size"),
        ({"horovod_scope": "node"}, {"horovod_scope": "world"}, "horovod_scope"),
    )
    for common, odd, name in cases:
        options = odd if me.rank == ODD_ONE else common
        said = refused(me, lambda _, o=options: hvd.init(**o))
        assert said.startswith("init: rank 2 and rank 0 differ in "), said
        assert name in said
    with pytest.MonkeyPatch.context() as patch:
        if me.rank == ODD_ONE:
            patch.setenv("GOSSIP_HVD_SEED", "7")
        said = refused(me, lambda _: hvd.init())
        assert "GOSSIP_HVD_SEED" in said
        assert "7" in said
    assert not hvd.is_initialized()
    hvd.init(node_size=2)
    assert hvd.nodes() == 2


@on_ranks([*ALONE, *BOTH_SCOPES])
def test_after_a_refusal_all_goes_on(me: Rank) -> None:
    model = mlp()
    for wrong in ({"method": "crosover"}, {"segments": "block"}, {"peers": "fiar"}):
        with pytest.raises(hvd.ConfigError):
            hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **wrong)
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
    plain(model, optimizer, *batch(me.rank, 0, torch.float64, 5, 3))
    bits = me.gather(vector(model))
    assert all(torch.equal(bits[0], other) for other in bits)


UNKNOWN = (
    ({"method": "crosover"}, r"unknown method 'crosover'.*did you mean 'crossover'\?"),
    ({"method": "allredcue"}, r"did you mean 'allreduce'\?"),
    ({"peers": "fiar"}, r"unknown peers 'fiar'.*did you mean 'fair'\?"),
    ({"timing": "acw"}, r"unknown timing 'acw'.*did you mean 'awc'\?"),
    ({"wire_dtype": "bfloat"}, r"unknown wire_dtype 'bfloat'.*did you mean 'bfloat16'\?"),
    ({"method": "gossip", "topology": "rng"}, r"unknown topology 'rng'.*did you mean 'ring'\?"),
    ({"peer": "fair"}, r"unknown option of method 'crossover' 'peer'.*did you mean 'peers'\?"),
    ({"tming": "awc"}, r"unknown option.*'tming'.*did you mean 'timing'\?"),
    ({"method": "gossip", "peer": 2}, r"unknown option of method 'gossip' 'peer'"),
    ({"staleness": 1}, "only timing='awc'"),
    ({"timing": "awc", "staleness": -1}, "staleness is 0 or more"),
    ({"chunk_bytes": 1}, "expected a multiple of 64"),
    ({"method": "allreduce", "timing": "awc"}, "does not fit method 'allreduce'"),
    ({"op": hvd.Max}, "Average or Sum"),
)


@on_ranks([*ALONE, Job(2)])
def test_unknown_names_are_answered_with_the_nearest(me: Rank) -> None:
    for options, said in UNKNOWN:
        model = mlp()
        with pytest.raises(hvd.ConfigError, match=said):
            hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **options)


@on_ranks([Job(1)], bare=True)
def test_unknown_settings_of_init_are_answered_with_the_nearest(me: Rank) -> None:
    for options, said in (
        ({"horovod_scope": "nod"}, r"unknown horovod_scope 'nod'.*did you mean 'node'\?"),
        ({"node_size": 0}, "node_size=0: expected 1 to 1"),
        ({"node_size": 5}, "node_size=5: expected 1 to 1"),
    ):
        with pytest.raises(hvd.ConfigError, match=said):
            hvd.init(**options)
    for name, value, said in (
        ("GOSSIP_HVD_SCOPE", "wrld", r"'wrld'.*did you mean 'world'\?"),
        ("GOSSIP_HVD_NODE_SIZE", "two", "GOSSIP_HVD_NODE_SIZE='two': expected a number of ranks"),
        ("GOSSIP_HVD_NODE_SIZE", "0", "GOSSIP_HVD_NODE_SIZE='0'"),
        ("GOSSIP_HVD_STALL_TIMEOUT", "-3", "expected a number of seconds"),
        ("GOSSIP_HVD_METOD", "gossip", r"GOSSIP_HVD_METOD.*did you mean 'GOSSIP_HVD_METHOD'\?"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(hvd.ConfigError, match=said):
                hvd.init()
        assert not hvd.is_initialized()
    hvd.init()
    for name, value, said in (
        ("GOSSIP_HVD_METHOD", "crosover", r"did you mean 'crossover'\?"),
        ("GOSSIP_HVD_SEED", "x", "GOSSIP_HVD_SEED='x': expected an integer"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(hvd.ConfigError, match=said):
                hvd.DistributedOptimizer(sgd(mlp()))


@on_ranks([*ALONE, Job(2)])
def test_what_horovod_refuses_is_refused(me: Rank) -> None:
    model = mlp()
    named = list(model.named_parameters())
    for arguments, said in (
        ({"named_parameters": [p for _, p in named]}, "sequence of tuples"),
        ({"named_parameters": [("same", p) for _, p in named]}, "duplicates: same"),
        ({"named_parameters": named[:-1]}, "were not named"),
        ({"backward_passes_per_step": 0}, "must be > 0"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "not supported with op != Average"),
        ({"num_groups": -1}, "non-negative"),
    ):
        with pytest.raises(ValueError, match=said):
            hvd.DistributedOptimizer(sgd(model), **arguments)


@on_ranks([Job(2)])
def test_parameters_that_cannot_be_averaged_are_named(me: Rank) -> None:
    model = mlp()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(hvd.ConfigError, match="no parameter of this optimizer requires"):
        hvd.DistributedOptimizer(sgd(model), model.named_parameters())
    model = torch.nn.Module()
    model.tiny = torch.nn.Parameter(torch.zeros(4, dtype=torch.float8_e4m3fn))
    with pytest.raises(hvd.ConfigError, match=r"'tiny' is torch\.float8_e4m3fn"):
        hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters()
        )
