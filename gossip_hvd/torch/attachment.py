"""What wrapping puts on an optimizer: hooks and methods, and how they come off again.

None of it keeps the optimizer alive. One that is dropped must be gone at once, not when Python's
collector comes by, which it does at another time on every rank: until then it would reduce
gradients that other ranks do not.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from gossip_hvd.gossip import forget


class Attachment:
    """Hooks and attributes on one optimizer.

    Args:
        optimizer: it is given them.
        hooks: handles of those on the optimizer itself.
        attributes: by name, in place of its own.
        number: its gossip is forgotten under this number when the optimizer is gone.
        on_parameters: handles of hooks on parameters, removed then too.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        hooks: Sequence[Any],
        attributes: Mapping[str, Any],
        number: int,
        on_parameters: Sequence[dict[int, Any]],
    ) -> None:
        self._optimizer, self._hooks = weakref.ref(optimizer), hooks
        self._ours = attributes
        self._before = {
            name: vars(optimizer)[name] for name in attributes if name in vars(optimizer)
        }
        for name, value in attributes.items():
            setattr(optimizer, name, value)
        # It holds handles only: what held a parameter could hold the optimizer.
        self._end = weakref.finalize(optimizer, _off, number, on_parameters)
        self._end.atexit = False

    def remove(self) -> None:
        """Make the optimizer a plain one again."""
        self._end()
        for hook in self._hooks:
            hook.remove()
        optimizer = self._optimizer()
        if optimizer is None:
            return
        for name, ours in self._ours.items():
            if vars(optimizer).get(name) is ours:  # else somebody has replaced it since
                delattr(optimizer, name)
                if name in self._before:
                    setattr(optimizer, name, self._before[name])


def with_it(
    optimizer: torch.optim.Optimizer,
    name: str,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> Callable[..., None]:
    """A method of the optimizer's with something before and after it."""
    plain = getattr(optimizer, name)
    own = getattr(plain, "__self__", None) is optimizer
    find: Callable[[], Any] = weakref.WeakMethod(plain) if own else lambda: plain

    def method(*args: Any, **kwargs: Any) -> None:
        if (found := find()) is not None:
            before()
            found(*args, **kwargs)
            after()

    # Not functools.wraps, which keeps what it wraps.
    method.__name__, method.__doc__ = name, plain.__doc__
    method.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    return method


def _off(number: int, on_parameters: Iterable[dict[int, Any]]) -> None:
    forget(number)
    for hooks in on_parameters:
        while hooks:
            hooks.popitem()[1].remove()
