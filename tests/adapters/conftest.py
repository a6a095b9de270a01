"""Tests of an adapter are for environments that have its framework."""

from __future__ import annotations

from importlib.util import find_spec

torch = find_spec("torch") is not None
tensorflow = find_spec("tensorflow") is not None

collect_ignore_glob = [
    *([] if torch else ["test_torch_*.py"]),
    *([] if tensorflow else ["test_keras_*.py", "test_tensorflow_*.py"]),
]
