"""Tests of an adapter are for environments that have its framework.

Those of adapters that are still being built run only where ``GOSSIP_TESTS=all`` asks for them,
as ``make test-all`` does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

everything = os.environ.get("GOSSIP_TESTS") == "all"
torch = find_spec("torch") is not None
tensorflow = find_spec("tensorflow") is not None

collect_ignore_glob = [
    *([] if torch else ["test_torch_*.py"]),
    *([] if everything and torch else ["test_torch_trainers.py"]),
    *([] if tensorflow else ["test_keras_*.py", "test_tensorflow_*.py"]),
]
