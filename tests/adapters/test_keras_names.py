"""Horovod's names and arguments are all here, and what cannot work says so; no ranks needed."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

INTERNAL = {
    "LocalGradientAggregationHelper",
    "check_extension",
    "check_num_rank_power_of_2",
    "gpu_available",
    "handle_average_backwards_compatibility",
    "is_version_greater_equal_than",
    "refs_to_vars",
    "split_list",
    "vars_to_refs",
}
"""What Horovod's modules show without meaning to."""

PAIRS = [
    ("horovod.tensorflow", "gossip_hvd.tensorflow"),
    ("horovod.tensorflow.keras", "gossip_hvd.tensorflow.keras"),
    ("horovod.tensorflow.keras.callbacks", "gossip_hvd.tensorflow.keras.callbacks"),
    ("horovod.keras", "gossip_hvd.keras"),
]


def own(module: ModuleType) -> dict[str, object]:
    """The public names of one of Horovod's modules, without what it has imported from others."""
    names = [name for name in dir(module) if not name.startswith("_") and name not in INTERNAL]
    values = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if not inspect.ismodule(value) or name in ("callbacks", "elastic")
    }


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_every_name_of_horovods_is_here(theirs: str, ours: str) -> None:
    here = importlib.import_module(ours)
    assert [name for name in own(importlib.import_module(theirs)) if not hasattr(here, name)] == []


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_every_argument_of_horovods_is_known_and_in_its_place(theirs: str, ours: str) -> None:
    here = importlib.import_module(ours)
    for name, value in own(importlib.import_module(theirs)).items():
        if not callable(value) or name == "init":
            continue
        wanted = list(inspect.signature(value).parameters)
        found = list(inspect.signature(getattr(here, name)).parameters)
        if found == ["args", "kwargs"]:  # refused, whatever it is given
            continue
        assert set(wanted) <= set(found), name
        if theirs != "horovod.keras":  # whose order is not that of horovod.tensorflow.keras
            assert found[: len(wanted)] == wanted, name


def test_public_names_are_listed_and_exist() -> None:
    for _, name in PAIRS:
        module = importlib.import_module(name)
        assert [each for each in module.__all__ if not hasattr(module, each)] == []


@pytest.mark.parametrize("name", ["PartialDistributedOptimizer", "broadcast_global_variables"])
def test_what_has_no_meaning_says_what_to_use(name: str) -> None:
    hvd = importlib.import_module("gossip_hvd.keras")
    with pytest.raises(hvd.ConfigError, match=name):
        getattr(hvd, name)(None)


def test_elastic_says_what_to_use() -> None:
    hvd = importlib.import_module("gossip_hvd.tensorflow")
    with pytest.raises(hvd.ConfigError, match=r"elastic\.run.*GossipCheckpoint"):
        hvd.elastic.run(None)


def test_a_backend_without_horovod_is_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """jax is not installed here, and Keras's NumPy backend needs it too."""
    backend = importlib.import_module("gossip_hvd.tensorflow.keras.backend")
    monkeypatch.setattr(backend.keras.backend, "backend", lambda: "jax")
    with pytest.raises(backend.ConfigError, match="Horovod has no operations for jax"):
        backend.framework.__wrapped__()
