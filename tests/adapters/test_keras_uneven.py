"""Ranks with different numbers of steps: an error or a finish within the limit, never a hang."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import launch

PROGRAM = Path(__file__).with_name("keras_uneven.py")
ENVIRON = {"GOSSIP_HVD_STALL_TIMEOUT": "6", "GOSSIP_HVD_SHUTDOWN_TIMEOUT": "6"}
SENTENCES = ("StallError", "has been shut down", "No progress", "waited")


@pytest.mark.parametrize(
    ("backend", "node_size", "callback"),
    [
        ("tensorflow", "1", ""),
        ("tensorflow", "2", "MetricAverageCallback"),
        ("torch", "1", "MetricAverageCallback"),
        ("torch", "2", ""),
    ],
)
def test_uneven_steps_end(backend: str, node_size: str, callback: str) -> None:
    environ = {**ENVIRON, "KERAS_BACKEND": backend}
    outcome = launch(PROGRAM, 2, node_size, callback, limit=200.0, environ=environ)
    assert outcome.code is not None, outcome.text
    assert not outcome.left
    if outcome.code:
        assert any(sentence in outcome.text for sentence in SENTENCES), outcome.text
