"""Operations under way on tensors, whoever carries them out: Horovod, or this library.

Every public operation begins here. In scope ``world``, and on the node's own process set, Horovod
carries it out; otherwise it is one of ours, matched by name (see ``gossip_hvd.operations``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import horovod.torch as horovod
import torch
from horovod.common.exceptions import HorovodInternalError

from gossip_hvd import session
from gossip_hvd.errors import failing_as
from gossip_hvd.torch.process_sets import NodeProcessSet, horovod_set, number_of
from gossip_hvd.torch.tensors import array_of, restored, staged, tensor_of
from gossip_hvd.waits import Facts, waiting

OPS = {
    horovod.Average: "average",
    horovod.Sum: "sum",
    horovod.Min: "min",
    horovod.Max: "max",
    horovod.Product: "product",
}

SPIN, CROWDED = 1e-2, 1e-3
"""Seconds for which a wait for Horovod gives its core away only to who asks for it: where every
rank of this host may have one, and where not. Horovod's own wait never sleeps."""

PAUSE = 5e-5
"""Seconds between two looks afterwards."""

Tensors = Sequence[torch.Tensor]


class RefusedError(HorovodInternalError, ValueError):  # type: ignore[misc]
    """An operation that Horovod refuses with ``ValueError`` where it is asked for.

    Here it is an error on every rank, so it is also what Horovod raises for disagreements.
    """


class Pending:
    """An operation that has begun; ``poll`` and ``synchronize`` take it.

    Args:
        done: says whether it has ended.
        result: waits and returns what ``synchronize`` shall return; called once.
    """

    def __init__(self, done: Callable[[], bool], result: Callable[[], Any]) -> None:
        self._done = done
        self._result: Callable[[], Any] | None = result

    def poll(self) -> bool:
        """Whether ``synchronize`` returns without waiting."""
        return self._result is None or self._done()

    def synchronize(self) -> Any:
        """Wait; the result the first time, and as with Horovod None afterwards."""
        result, self._result = self._result, None
        return None if result is None else result()


def poll(handle: Any) -> bool:
    """Whether an asynchronous operation has ended, so that ``synchronize`` would not wait."""
    return handle.poll() if isinstance(handle, Pending) else bool(horovod.poll(handle))


def synchronize(handle: Any) -> Any:
    """Wait for an asynchronous operation and return its result.

    Raises:
        HorovodInternalError: on every rank, where ranks asked for different things under one
            name, or one of them never asked.
    """
    if isinstance(handle, Pending):
        return handle.synchronize()
    current = session.current()
    facts = partial(current.waits_for, range(current.world.size), "synchronize", travels=True)
    return watched(handle, facts)


def watched(handle: int, facts: Callable[[], Facts]) -> Any:
    """As Horovod's ``synchronize``, which would wait for ever.

    Args:
        handle: Horovod's.
        facts: says who waits for whom; not asked where there is nothing to wait for.
    """
    if not horovod.poll(handle):
        until = time.monotonic() + _spin(session.current().world.local_size)
        with waiting(facts()) as wait:
            while not horovod.poll(handle):
                wait.check()
                if time.monotonic() < until:
                    os.sched_yield()
                else:
                    time.sleep(PAUSE)
    return horovod.synchronize(handle)


@lru_cache
def _spin(ranks: int) -> float:
    return SPIN if ranks <= (os.cpu_count() or 1) else CROWDED


def begin(
    kind: str,
    tensors: Tensors,
    name: str | None,
    process_set: Any,
    *,
    grouped: bool = False,
    inplace: bool = False,
    **details: Any,
) -> Pending:
    """Begin an operation on tensors.

    Args:
        kind: ``"allreduce"``, ``"reducescatter"``, ``"broadcast"``, ``"allgather"`` or
            ``"alltoall"``.
        tensors: one, or those of a group.
        name: matches ranks; None for the next number.
        process_set: the ranks that take part.
        grouped: whether the result is a list.
        inplace: write the result into the tensors.
        details: ``op``, ``prescale``, ``postscale``, ``root`` or ``splits``; ``awaited``, where the
            caller waits for it at once.

    Raises:
        HorovodInternalError: for a name that is in use.
        ValueError: for a tensor that cannot travel, or a process set without this rank.
    """
    inside = horovod_set(process_set)
    how = {"for_horovod": inside is not None, "reducing": "op" in details}
    sources = [staged(tensor, **how) for tensor in tensors]
    if inside is not None:
        apart = isinstance(process_set, NodeProcessSet) and session.current().scope == "node"
        if kind == "broadcast" and apart:
            details["root"] = process_set.ranks.index(details["root"])
        if name is None:
            # Horovod's own numbers go apart where one rank has made more calls than another.
            name = session.current().operations.next_name(kind, -1 - inside.process_set_id)
        handle = _at_horovod(kind, sources, name, inside, grouped, inplace, details)
        done: Callable[[], bool] = partial(horovod.poll, handle)
        ranks, what = process_set.ranks or (), f"{kind} {name!r}"
        facts = partial(session.current().waits_for, ranks, what, travels=True)
        wait: Callable[[], Any] = partial(watched, handle, facts)
    else:
        done, wait = _ours(kind, sources, name, number_of(process_set), inplace, details)

    def result() -> Any:
        results = wait()
        if kind == "alltoall":
            return restored(results[0], tensors[0]), results[1]
        results = list(results) if isinstance(results, list | tuple) else [results]
        outputs = [_deliver(t, r, inplace) for t, r in zip(tensors, results, strict=True)]
        return tuple(outputs) if grouped else outputs[0]

    return Pending(done, result)


def _deliver(tensor: torch.Tensor, result: torch.Tensor, inplace: bool) -> torch.Tensor:
    if not inplace:
        return restored(result, tensor)
    if result.data_ptr() != tensor.data_ptr() or result.dtype != tensor.dtype:
        with torch.no_grad():
            tensor.copy_(restored(result, tensor).view_as(tensor))
    return tensor


def _at_horovod(
    kind: str,
    sources: list[torch.Tensor],
    name: str | None,
    inside: Any,
    grouped: bool,
    inplace: bool,
    details: dict[str, Any],
) -> Any:
    verb = getattr(horovod, f"{'grouped_' * grouped}{kind}_async{'_' * inplace}")
    given: dict[str, Any] = {"name": name, "process_set": inside}
    if kind in ("allreduce", "reducescatter"):
        given |= {
            "op": details["op"],
            "prescale_factor": details["prescale"],
            "postscale_factor": details["postscale"],
        }
    elif kind == "broadcast":
        given["root_rank"] = details["root"]
    elif kind == "alltoall":
        given["splits"] = details["splits"]
    return verb(sources if grouped else sources[0], **given)


def _ours(
    kind: str,
    sources: list[torch.Tensor],
    name: str | None,
    members: int,
    inplace: bool,
    details: dict[str, Any],
) -> tuple[Callable[[], bool], Callable[[], Any]]:
    if "op" in details:
        details["op"] = _named(details["op"])
    given = details.pop("splits", None)
    if isinstance(given, torch.Tensor) and (given.is_floating_point() or given.is_complex()):
        raise ValueError(f"alltoall expects splits to be whole numbers, not {given.dtype}.")
    if given is not None:
        details["splits"] = tuple(int(n) for n in given)
    same = kind in ("allreduce", "broadcast")
    targets = [s if inplace else torch.empty_like(s) for s in sources] if same else []
    with failing_as(RefusedError):
        handle = session.current().operations.submit(
            kind,
            None if name is None else f"torch.{name}",
            [array_of(source) for source in sources],
            [source.shape for source in sources],
            [array_of(target) for target in targets],
            members=members,
            **details,
        )

    def wait() -> Any:
        with failing_as(RefusedError if kind == "alltoall" else HorovodInternalError):
            results = handle.wait()
        if same:
            return targets
        if kind == "alltoall":
            received = tensor_of(results[1], -1)
            if isinstance(given, torch.Tensor):
                received = received.to(given)
            rows = int(received.sum())
            return tensor_of(results[0], (rows, *sources[0].shape[1:])), received
        return [
            tensor_of(result, (_rows(handle, kind, i, source), *source.shape[1:]))
            for i, (source, result) in enumerate(zip(sources, results, strict=True))
        ]

    return (lambda: handle.done), wait


def _rows(handle: Any, kind: str, index: int, source: torch.Tensor) -> int:
    """The first dimension of a result; counted, since rows may have no elements."""
    operations = session.current().operations
    if kind == "allgather":
        return sum(row[index] for row in handle.response.rows)
    ranks = operations.sets[handle.request.members]
    place = ranks.index(operations.rank)
    return source.shape[0] // len(ranks) + (place < source.shape[0] % len(ranks))


def _named(op: Any) -> str:
    if op == horovod.Adasum:
        raise NotImplementedError(
            "Adasum over the world is Horovod's own: use init(horovod_scope='world'), or another "
            "op (Average, Sum, Min, Max, Product)."
        )
    if op not in OPS:
        raise ValueError(f"op={op!r} is no reduction: expected one of Horovod's constants.")
    return OPS[op]
