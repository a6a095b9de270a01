"""Nested state as JSON and a list of tensors, and back; nothing is pickled.

    {"lr": 0.1, 0: [t]}  ⇄  {"dict": [["lr", 0.1], [0, {"list": [{"tensor": 0}]}]]}  and  [t]

Dictionaries keep their order and whole numbers as keys; tuples stay tuples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gossip_hvd.errors import CheckpointError

DEEPEST = 64
"""Levels of nesting; real state has about five."""


@dataclass(frozen=True)
class Named:
    """A tensor and where in the state it stands."""

    name: str
    tensor: Any


def flatten(value: Any, kinds: type | tuple[type, ...], where: str = "") -> tuple[Any, list[Named]]:
    """Plain JSON in place of nested state, and the tensors in their order.

    Args:
        value: dictionaries, lists, tuples, numbers, strings, booleans, None and tensors.
        kinds: the types that are tensors.
        where: the name of the whole.

    Raises:
        CheckpointError: names the first value that is none of these.
    """
    found: list[Named] = []

    def walk(item: Any, place: str) -> Any:
        if isinstance(item, kinds):
            found.append(Named(place, item))
            return {"tensor": len(found) - 1}
        if isinstance(item, Mapping):
            for key in item:
                if not _is_key(key):
                    raise CheckpointError(
                        f"{place}: the key {key!r} is neither a string nor a whole number, and "
                        "nothing else is saved without pickle."
                    )
            return {"dict": [[key, walk(part, _join(place, key))] for key, part in item.items()]}
        if isinstance(item, list | tuple):
            kind = "tuple" if isinstance(item, tuple) else "list"
            return {kind: [walk(part, _join(place, i)) for i, part in enumerate(item)]}
        if item is None or type(item) in (bool, int, float, str):
            return item
        raise CheckpointError(
            f"{place or 'the state'} is a {type(item).__name__}; only tensors, numbers, strings, "
            "lists, tuples and dictionaries are saved without pickle."
        )

    return walk(value, where), found


def unflatten(tree: Any, count: int, tensor: Callable[[int], Any]) -> Any:
    """The nested state of a tree.

    Args:
        tree: from ``flatten``, perhaps damaged since.
        count: how many tensors there are.
        tensor: gives one of them by its number.

    Raises:
        CheckpointError: for a tree that ``flatten`` does not make.
    """

    def revive(part: Any, depth: int) -> Any:
        if part is None or isinstance(part, bool | int | float | str):
            return part
        if not isinstance(part, dict) or len(part) != 1 or depth > DEEPEST:
            raise _damaged(f"a {type(part).__name__} at depth {depth}")
        ((kind, content),) = part.items()
        if kind == "tensor":
            if type(content) is not int or not 0 <= content < count:
                raise _damaged(f"tensor {content!r:.20} of {count}")
            return tensor(content)
        if kind not in ("dict", "list", "tuple") or not isinstance(content, list):
            raise _damaged(f"an entry of kind {kind[:20]!r}")
        if kind == "dict":
            if not all(isinstance(p, list) and len(p) == 2 and _is_key(p[0]) for p in content):
                raise _damaged("a dictionary without keys")
            return {key: revive(value, depth + 1) for key, value in content}
        items = [revive(item, depth + 1) for item in content]
        return tuple(items) if kind == "tuple" else items

    return revive(tree, 0)


def _is_key(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool))


def _join(place: str, key: Any) -> str:
    return f"{place}/{key}" if place else str(key)


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"the saved tree is damaged: {what}.")
