"""Lightning and Accelerate themselves, where they are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from launch import launch


@pytest.mark.parametrize("scope", ["node", "world"])
@pytest.mark.parametrize("package", ["lightning", "accelerate"])
def test_the_real_package_trains(package: str, scope: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'gossip_hvd[{package}]'")
    program = Path(__file__).with_name(f"{package}_job.py")
    done = launch(program, 4, "2", limit=120, environ={"GOSSIP_HVD_SCOPE": scope})
    assert done.code == 0, done.text
    assert "all well" in done.out
