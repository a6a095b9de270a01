"""The example that shows what Horovod does under Keras 3, and what this library does."""

from __future__ import annotations

import pytest
from launch import ROOT, launch

PROGRAM = ROOT / "examples" / "migrate" / "keras_silence.py"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("horovod.tensorflow.keras", "different: nothing was averaged"),
        ("gossip_hvd.tensorflow.keras", "equal"),
    ],
)
def test_only_one_of_them_averages(module: str, said: str) -> None:
    environ = {"KERAS_BACKEND": "tensorflow"}
    outcome = launch(PROGRAM, 2, module, limit=120.0, environ=environ)

    assert outcome.code == 0, outcome.text
    assert outcome.out.rstrip().endswith(said), outcome.text
    assert not outcome.left
