"""Tests of an adapter are for environments that have its framework."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [
    *([] if find_spec("torch") else ["test_torch_*.py"]),
    *([] if find_spec("keras") and find_spec("tensorflow") else ["test_keras_*.py"]),
    *([] if find_spec("tensorflow") else ["test_tensorflow_*.py"]),
]
