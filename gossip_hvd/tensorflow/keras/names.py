"""Names of Keras variables, and the blocks of a model that they tell of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NUMBERED_BLOCK = re.compile(r"(?:.*?_)?(?:block|blocks|layer|layers|stage|cell)_?\d+[a-z]?(?=_|$)")
"""What repeated blocks are called: ``conv2_block1``, ``block2a``, ``encoder_layer_3``."""


def name_of(variable: Any) -> str:
    """A variable's path, or TensorFlow's own name for it."""
    return str(getattr(variable, "path", None) or variable.name)


def blocks_of(names: Sequence[str]) -> dict[str, str]:
    """The block of every variable: the part of its path that stands for a block or a layer.

    ``resnet50/conv2_block1_1_conv/kernel`` is in block ``conv2_block1``, as are all layers whose
    names begin so; ``bert/encoder/layer_3/attention/query/kernel`` in ``encoder/layer_3``;
    ``sequential/dense_2/kernel`` in ``dense_2``.
    """
    paths = {name: name.split("/")[:-1] for name in names}
    firsts = {path[0] if path else "" for path in paths.values()}
    # The model's own name leads every path where its layers were made inside it.
    strip = len(firsts) == 1 and any(len(path) > 1 for path in paths.values())
    return {name: _block(path[strip:] or path) or name for name, path in paths.items()}


def _block(path: Sequence[str]) -> str:
    for depth, part in enumerate(path):
        found = NUMBERED_BLOCK.match(part)
        if found:
            return "/".join([*path[:depth], found.group()])
    return path[0] if path else ""
