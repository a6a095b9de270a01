"""What happens once an operation is agreed: values travel, results reach whoever asked.

Neighbouring small all-reduces travel together. A rank that has joined takes part with values that
change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from gossip_hvd.errors import OperationError
from gossip_hvd.handle import Handle
from gossip_hvd.mixing import Array, dtype_of
from gossip_hvd.reductions import neutral, scale
from gossip_hvd.requests import Request, Response
from gossip_hvd.small import deliver, nbytes

if TYPE_CHECKING:
    from gossip_hvd.transport.group import Group
    from gossip_hvd.transport.mpi import World

FUSED = 1 << 26
"""Bytes up to which neighbouring all-reduces travel together."""


@dataclass
class Asked:
    """What one rank asked for, and where its values are."""

    handle: Handle
    inputs: list[Array]
    outputs: list[Array]


class Executor:
    """The data phase of every operation.

    Args:
        world: all ranks.

    Attributes:
        sets: world ranks of every process set, by number.
    """

    def __init__(self, world: World) -> None:
        self._rank = world.rank
        self.sets: dict[int, tuple[int, ...]] = {0: tuple(range(world.size))}
        self._groups: dict[int, Group] = {0: world.group()}

    def free(self) -> None:
        """Give all communicators back; collective."""
        for number in sorted(self._groups):
            self._groups[number].free()

    @staticmethod
    def batches(responses: Sequence[Response]) -> Iterator[list[Response]]:
        """Cut responses into those that travel together; the same on all ranks.

        Errors that only some ranks are told come first, on their own: between two responses of
        one batch they would part them here, and not on the other ranks.
        """
        yield from ([response] for response in responses if response.order == 0)
        batch: list[Response] = []
        room = 0
        for response in responses:
            if response.order == 0:
                continue
            size = sum(nbytes(response.request))
            if batch and size <= room and _alike(batch[-1], response):
                batch.append(response)
                room -= size
                continue
            if batch:
                yield batch
            batch, room = [response], FUSED - size
        if batch:
            yield batch

    def run(self, batch: list[Response], mine: list[Asked | None]) -> None:
        """Carry out a batch and finish its handles.

        Args:
            batch: from ``batches``.
            mine: for each response what this rank asked for, or None.
        """
        first = batch[0]
        kind = first.request.kind
        if first.error:
            for asked in mine:
                if asked is not None:
                    asked.handle.fail(OperationError(first.error))
            return
        if first.values:
            results = [self._delivered(first, mine[0])]
        elif kind == "allreduce":
            results = self._allreduce(batch, mine)
        else:
            results = [getattr(self, f"_{kind}")(first, mine[0])]
        for response, asked, result in zip(batch, mine, results, strict=True):
            if asked is not None:
                asked.handle.finish(response, result)

    def _delivered(self, response: Response, asked: Asked | None) -> list[Array]:
        if asked is None:
            return []
        deliver(response, asked.outputs)
        return asked.outputs

    def _allreduce(self, batch: list[Response], mine: list[Asked | None]) -> list[list[Array]]:
        request = batch[0].request
        group = self._groups[request.members]
        taken = [
            _taken(response.request, asked) for response, asked in zip(batch, mine, strict=True)
        ]
        dtypes = {values.dtype for _, outputs in taken for values in outputs}
        for dtype in sorted(dtypes, key=str):
            pairs = [
                (source, target)
                for inputs, outputs in taken
                for source, target in zip(inputs, outputs, strict=True)
                if target.dtype == dtype
            ]
            if len(pairs) == 1:
                source, values = pairs[0]
            else:
                source = values = np.concatenate([source for source, _ in pairs])
            if request.prescale != 1.0:
                if source is not values:
                    np.copyto(values, source)
                    source = values
                scale(values, request.prescale)
            group.allreduce(values, request.op, source)
            scale(values, request.postscale, group.size if request.op == "average" else 1)
            if len(pairs) > 1:
                start = 0
                for _, target in pairs:
                    target[...] = values[start : start + target.size]
                    start += target.size
        return [outputs for _, outputs in taken]

    def _reducescatter(self, response: Response, asked: Asked | None) -> list[Array]:
        request = response.request
        group = self._groups[request.members]
        inputs, _ = _taken(request, asked)
        results = []
        for values, shape in zip(inputs, request.shapes, strict=True):
            rows = [share_of(shape[0], group.size, i) for i in range(group.size)]
            cuts = np.concatenate(([0], np.cumsum(rows))) * prod(shape[1:])
            if request.prescale != 1.0:
                values = values.copy()
                scale(values, request.prescale)
            result = group.reduce_scatter(values, cuts.tolist(), request.op)
            scale(result, request.postscale, group.size if request.op == "average" else 1)
            results.append(result)
        return results

    def _allgather(self, response: Response, asked: Asked | None) -> list[Array]:
        request = response.request
        group = self._groups[request.members]
        results = []
        for i, (shape, dtype) in enumerate(zip(request.shapes, request.dtypes, strict=True)):
            width = prod(shape[1:]) * dtype_of(dtype).itemsize
            rows = np.empty(0, np.uint8) if asked is None else asked.inputs[i].view(np.uint8)
            counts = [row[i] for row in response.rows]
            results.append(group.allgather(rows, width, counts).view(dtype_of(dtype)))
        return results

    def _alltoall(self, response: Response, asked: Asked | None) -> list[Array]:
        assert asked is not None, "alltoall is refused while ranks have joined"
        request = response.request
        group = self._groups[request.members]
        dtype = dtype_of(request.dtypes[0])
        width = prod(request.shapes[0][1:]) * dtype.itemsize
        received = group.alltoall(asked.inputs[0].view(np.uint8), width, response.rows)
        splits = np.array([row[group.rank] for row in response.rows], np.int32)
        return [received.view(dtype), splits]

    def _broadcast(self, response: Response, asked: Asked | None) -> list[Array]:
        request = response.request
        group = self._groups[request.members]
        root = self.sets[request.members].index(request.root)
        inputs, outputs = _taken(request, asked)
        for source, target in zip(inputs, outputs, strict=True):
            if group.rank == root and source is not target:
                np.copyto(target, source)
            group.broadcast(target.view(np.uint8), root)
        return outputs

    def _barrier(self, response: Response, asked: Asked | None) -> list[Array]:
        return []

    _join = _shutdown = _barrier

    def _add_process_set(self, response: Response, asked: Asked | None) -> list[Array]:
        ranks, number = response.request.splits, response.rows[0][0]
        self.sets[number] = ranks
        if self._rank in ranks:
            self._groups[number] = self._groups[0].part(ranks)
        return [np.array([number])]

    def _remove_process_set(self, response: Response, asked: Asked | None) -> list[Array]:
        number = response.request.splits[0]
        del self.sets[number]
        group = self._groups.pop(number, None)
        if group is not None:
            group.free()
        return []


def share_of(rows: int, parts: int, index: int) -> int:
    """Rows that part ``index`` gets of a reduce-scatter: the first parts get the remainder."""
    return rows // parts + (index < rows % parts)


def _taken(request: Request, asked: Asked | None) -> tuple[list[Array], list[Array]]:
    """Inputs and outputs of this rank; of one that has joined, values that change nothing."""
    if asked is not None:
        return asked.inputs, asked.outputs
    made = []
    for shape, dtype in zip(request.shapes, request.dtypes, strict=True):
        values = np.empty(prod(shape), dtype_of(dtype))
        neutral(request.op or "sum", values)
        made.append(values)
    return made, made


def _alike(one: Response, other: Response) -> bool:
    """Whether two responses, one right behind the other on every rank, may travel together."""
    a, b = one.request, other.request
    return (
        a.kind == b.kind == "allreduce"
        and not (one.error or other.error or one.values or other.values)
        and other.order == one.order + 1
        and (a.members, a.op, a.prescale, a.postscale) == (b.members, b.op, b.prescale, b.postscale)
    )
