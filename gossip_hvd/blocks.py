"""Find a model's blocks (stem, blocks, head) from the names of its parameters; cut there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gossip_hvd.errors import ConfigError
from gossip_hvd.segments import Field, Layout

BlockRule = Callable[[str], str]
"""Gives a parameter's name the name of its block."""

BlockFinder = Callable[[Sequence[str]], Mapping[str, str]]
"""Gives all parameters' names their blocks."""

Segments = str | int | BlockRule | Mapping[str, Sequence[str]]
"""What users pass as ``segments``."""

UNNAMED_SEGMENTS = 16
"""Segments of a model whose names say nothing."""


def layout_of(fields: Sequence[Field], segments: Segments, finder: BlockFinder | None) -> Layout:
    """Lay out a model's parameters and cut them as the user has asked.

    Args:
        fields: the parameters, in the model's order; their blocks are filled in here.
        segments: ``"blocks"``, ``"one"``, a number of equally large ones, a function from a
            parameter's name to its segment's, or lists of names by segment.
        finder: finds the model's own blocks; None where names say nothing.

    Raises:
        ConfigError: for anything else, and for lists that do not fit the names.
    """
    names = [field.name for field in fields]
    if segments == "one":
        segments = 1
    elif segments == "blocks" and finder is None:
        segments = UNNAMED_SEGMENTS
    if isinstance(segments, int):
        return Layout.equal(fields, segments)
    if not isinstance(segments, str):
        blocks: Mapping[str, str] = blocks_by(segments, names)
    elif segments == "blocks" and finder is not None:
        blocks = finder(names)
    else:
        raise ConfigError(
            f"segments={segments!r}: expected 'blocks', 'one', a number, a function from a "
            "parameter's name to its segment's, or lists of names by segment."
        )
    return Layout.blocks([replace(field, block=blocks[field.name]) for field in fields])


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
