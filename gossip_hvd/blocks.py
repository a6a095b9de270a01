"""Find the blocks of a model (stem, blocks, head) from the names of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gossip_hvd.errors import ConfigError

BlockRule = Callable[[str], str]
"""Gives a parameter's name the name of its block."""


def blocks_of(names: Sequence[str]) -> dict[str, str]:
    """The block of every parameter, from where repeated modules stand in their names.

    A name such as ``layer1.0.conv1.weight`` or ``encoder.layers.3.norm.bias`` belongs to the
    block that its first index closes: ``layer1.0``, ``encoder.layers.3``. What comes before the
    first such block is the ``stem``, what comes after the last the ``head``. A model without
    indexed modules has a block for each of its own children.
    """
    found = {name: _indexed(name) for name in names}
    indexed = [i for i, name in enumerate(names) if found[name]]
    blocks = {}
    for i, name in enumerate(names):
        if found[name]:
            blocks[name] = found[name]
        elif not indexed:
            blocks[name] = name.split(".")[0]
        elif i < indexed[0]:
            blocks[name] = "stem"
        elif i > indexed[-1]:
            blocks[name] = "head"
        else:
            blocks[name] = name.split(".")[0]
    return blocks


def blocks_by(
    rule: BlockRule | Mapping[str, Sequence[str]], names: Sequence[str]
) -> dict[str, str]:
    """The user's own blocks: a function of the name, or lists of names by block.

    Raises:
        ConfigError: for a name that is in no list, in two, or not a parameter's.
    """
    if callable(rule):
        return {name: str(rule(name)) for name in names}
    blocks: dict[str, str] = {}
    for block, members in rule.items():
        for name in members:
            if name in blocks or name not in names:
                why = "is in two segments" if name in blocks else "is no parameter of this model"
                raise ConfigError(f"segments: {name!r} {why}; name every parameter once.")
            blocks[name] = block
    missing = [name for name in names if name not in blocks]
    if missing:
        raise ConfigError(f"segments: {missing[0]!r} is in no segment; name every parameter once.")
    return blocks


def _indexed(name: str) -> str:
    """The name up to its first index, further indices right behind it included; or nothing."""
    parts = name.split(".")[:-1]
    for i, part in enumerate(parts):
        if part.isdigit():
            while i + 1 < len(parts) and parts[i + 1].isdigit():
                i += 1
            return ".".join(parts[: i + 1])
    return ""
