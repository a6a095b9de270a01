"""Fixtures that several test files share."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import settings

# A loaded machine may take its time over an example; how many are tried is what counts.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


@pytest.fixture
def random() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20122)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tester's own environment decides nothing."""
    for name in os.environ:
        if name.startswith("GOSSIP_HVD_"):
            monkeypatch.delenv(name)
