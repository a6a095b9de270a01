"""Collectives over the ranks of a process set, on two levels: inside hosts, then across them.

An all-reduce of M bytes: the ranks of a host scatter-reduce (every carrying rank ends with one
share), the carriers of equal shares all-reduce across hosts, the host gathers. Bytes a host sends
to others: 2M(n−1)/n for n hosts, on as many connections as the smallest host has ranks; a flat
ring over all p ranks would send 2M(p−1)/p. What is large goes so in n chunks, around a ring of
hosts, and each chunk is reduced in the host just before it leaves, so that links seldom wait for
memory. What is small goes in one step over all ranks instead. Additions are MPI's where it knows
the dtype, else ours. Calls block, release the interpreter, and belong to one thread. Hosts are
physical: virtual nodes of one machine are one host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gossip_hvd.mixing import Array
from gossip_hvd.reductions import combine
from gossip_hvd.transport import Bytes

if TYPE_CHECKING:
    from mpi4py import MPI

SMALL = 1 << 16
"""Bytes over all ranks up to which one step beats several that each carry less."""

LARGE = 1 << 18
"""Bytes of a chunk, one a host, from which some travel while others are reduced or handed out."""

LARGEST = 1 << 28
"""Elements that one all-reduce takes at once; MPI counts in 31 bits."""


class Group:
    """The ranks of one process set.

    Args:
        mpi: the MPI module.
        comm: a communicator of these ranks, for this object alone.
        hosts: the host of each of them, by their order.

    Attributes:
        rank: this rank's position among them.
        size: how many they are.
    """

    def __init__(self, mpi: Any, comm: MPI.Intracomm, hosts: Sequence[str]) -> None:
        self._mpi, self._comm, self._hosts = mpi, comm, tuple(hosts)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        names = list(dict.fromkeys(hosts))
        self._homes = [names.index(host) for host in hosts]
        self._places = [self._homes[:i].count(home) for i, home in enumerate(self._homes)]
        self._lanes = min(self._homes.count(home) for home in range(len(names)))
        home, place = self._homes[self.rank], self._places[self.rank]
        self._host = self._comm.Split(home, self.rank)
        self._lane = self._comm.Split(place if place < self._lanes else mpi.UNDEFINED, home)
        self._spread = len(names)  # hosts

    def part(self, ranks: Sequence[int]) -> Group:
        """Some of these ranks as a group of their own; collective over those.

        Args:
            ranks: their positions here.
        """
        chosen = self._comm.Get_group().Incl(list(ranks))
        return Group(self._mpi, self._comm.Create_group(chosen), [self._hosts[r] for r in ranks])

    def free(self) -> None:
        """Give the communicators back; collective."""
        if self._lane != self._mpi.COMM_NULL:
            self._lane.Free()
        self._host.Free()
        self._comm.Free()

    def barrier(self) -> None:
        """Return when all have come here."""
        self._comm.Barrier()

    def allreduce(self, values: Array, op: str, source: Array | None = None) -> None:
        """Overwrite a 1-D array with a reduction, the same bits on every rank.

        Args:
            values: of one length and dtype on all ranks.
            op: see ``reductions.combine``.
            source: what to reduce: by default ``values``, otherwise not partly the same memory.
        """
        small = values.nbytes * self.size <= SMALL
        two_levels = not (small or self._spread == 1) and self._host.Get_size() > 1
        if source is None or np.may_share_memory(source, values):
            source = values
        if source is not values and not (two_levels and self._knows(values)):
            np.copyto(values, source)
            source = values
        if self.size == 1 or not values.size:
            return
        for start in range(0, values.size, LARGEST):
            part = values[start : start + LARGEST]
            if self._knows(values) and (small or self._spread == 1):
                self._comm.Allreduce(self._mpi.IN_PLACE, part, self._operation(op))
            elif small:
                every = np.empty((self.size, part.size), part.dtype)
                self._comm.Allgather(self._raw(part), self._raw(every))
                combine(op, list(every), part)
            else:
                taken = part if source is values else source[start : start + LARGEST]
                self._allreduce(part, op, taken)

    def _allreduce(self, values: Array, op: str, source: Array) -> None:
        large = values.nbytes >= LARGE * self._spread and self._knows(values)
        if large and self.size > self._spread:
            self._ring(values, op, source)
            return
        members, shares = self._host.Get_size(), self._shares(values.size)
        if members > 1:
            self._reduce_scatter(self._host, values, shares, op, source)
        if self._lane != self._mpi.COMM_NULL and self._lane.Get_size() > 1:
            lane = self._host.Get_rank()
            share = values[shares[lane] : shares[lane + 1]]
            if self._knows(share):
                self._lane.Allreduce(self._mpi.IN_PLACE, share, self._operation(op))
            else:
                parts = _cuts(share.size, self._lane.Get_size())
                self._reduce_scatter(self._lane, share, parts, op, share)
                self._gather(self._lane, share, parts)
        if members > 1:
            self._gather(self._host, values, shares)

    def _ring(self, values: Array, op: str, source: Array) -> None:
        """Reduce around the ring of n hosts, in as many chunks, and hand the sums on likewise.

        In step s host h sends chunk h − s to host h + 1, and adds to its own chunk h − s − 1 what
        host h − 1 sends; after n − 1 steps it has all of chunk h + 1.
        """
        hosts, me, place = self._spread, self._homes[self.rank], self._host.Get_rank()
        cuts = _cuts(values.size, hosts)
        chunks = [values[a:b] for a, b in pairwise(cuts)]
        sources = chunks if source is values else [source[a:b] for a, b in pairwise(cuts)]
        shares = [self._shares(chunk.size) for chunk in chunks]
        mine = [c[s[place] : s[place + 1]] for c, s in zip(chunks, shares, strict=True)]
        room = np.empty(max(map(len, mine)), values.dtype)
        alone = self._host.Get_size() == 1  # Such a host's source has been copied.

        def reduce(c: int) -> None:
            if not alone:
                self._reduce_scatter(self._host, chunks[c], shares[c], op, sources[c])

        def gather(c: int) -> None:
            if not alone:
                self._gather(self._host, chunks[c], shares[c])

        reduce(me)
        for step in range(hosts - 1):
            leaving, coming = (me - step) % hosts, (me - step - 1) % hosts
            received = room[: mine[coming].size]
            with self._travelling(mine[leaving], received):
                reduce(coming)
            combine(op, [mine[coming], received], mine[coming])
        for step in range(hosts - 1):
            leaving, coming = (me + 1 - step) % hosts, (me - step) % hosts
            with self._travelling(mine[leaving], mine[coming]):
                gather(leaving)
        gather((me + 2) % hosts)

    @contextmanager
    def _travelling(self, leaving: Array, coming: Array) -> Iterator[None]:
        """Within it one array goes to the next host of the ring, and one comes from the last."""
        if self._lane == self._mpi.COMM_NULL:
            yield
            return
        hosts, me = self._lane.Get_size(), self._lane.Get_rank()
        requests = [
            self._lane.Irecv(self._raw(coming), (me - 1) % hosts),
            self._lane.Isend(self._raw(leaving), (me + 1) % hosts),
        ]
        yield
        self._mpi.Request.Waitall(requests)

    def _shares(self, length: int) -> list[int]:
        """Where the share of each rank of this host starts, and the end."""
        others = self._host.Get_size() - self._lanes
        return _cuts(length, self._lanes) + [length] * others

    def _knows(self, values: Array) -> bool:
        """Whether MPI can add these: it knows neither 16-bit floats nor sums of bools."""
        return values.dtype.kind in "iu" or (values.dtype.kind == "f" and values.itemsize > 2)

    def _operation(self, op: str) -> Any:
        return getattr(self._mpi, {"min": "MIN", "max": "MAX", "product": "PROD"}.get(op, "SUM"))

    def _reduce_scatter(
        self, comm: Any, values: Array, cuts: Sequence[int], op: str, source: Array
    ) -> None:
        """Reduce each rank's stretch of ``source`` into ``values``, its own or others, there."""
        me, size = comm.Get_rank(), comm.Get_size()
        mine = values[cuts[me] : cuts[me + 1]]
        if self._knows(values):
            counts = [b - a for a, b in pairwise(cuts)]
            result = np.empty_like(mine) if source is values else mine
            comm.Reduce_scatter(source, result, counts, self._operation(op))
            if result is not mine:
                mine[...] = result
            return
        every = np.empty((size, mine.size), values.dtype)
        width = values.dtype.itemsize
        sends = [(b - a) * width for a, b in pairwise(cuts)]
        sends[me] = 0
        receives = [mine.nbytes] * size
        receives[me] = 0
        comm.Alltoallv(
            [values.view(np.uint8), sends, [a * width for a in cuts[:-1]], self._mpi.BYTE],
            [_bytes(every), receives, [i * mine.nbytes for i in range(size)], self._mpi.BYTE],
        )
        every[me] = mine
        combine(op, list(every), mine)

    def _gather(self, comm: Any, values: Array, cuts: Sequence[int]) -> None:
        """Give every rank the stretches that the others have reduced."""
        width = values.dtype.itemsize
        counts = [(b - a) * width for a, b in pairwise(cuts)]
        starts = [a * width for a in cuts[:-1]]
        everything = [values.view(np.uint8), counts, starts, self._mpi.BYTE]
        comm.Allgatherv(self._mpi.IN_PLACE, everything)

    def allgather(self, rows: Bytes, width: int, counts: Sequence[int]) -> Bytes:
        """Every rank's rows, by rank.

        In one ring over all ranks, which takes every row into every host once.

        Args:
            rows: this rank's, as bytes.
            width: bytes of a row.
            counts: rows of every rank.
        """
        out = np.empty(sum(counts) * width, np.uint8)
        if out.size:
            row = self._row(width)
            self._comm.Allgatherv([rows, counts[self.rank], row], [out, _table(counts), row])
            row.Free()
        return out

    def alltoall(self, rows: Bytes, width: int, splits: Sequence[Sequence[int]]) -> Bytes:
        """The rows that the others have for this rank, by rank.

        Args:
            rows: this rank's, as bytes.
            width: bytes of a row.
            splits: by sender, its rows for each rank.
        """
        receives = [row[self.rank] for row in splits]
        out = np.empty(sum(receives) * width, np.uint8)
        if width:
            row = self._row(width)
            self._comm.Alltoallv(
                [rows, _table(splits[self.rank]), row], [out, _table(receives), row]
            )
            row.Free()
        return out

    def broadcast(self, data: Bytes, root: int) -> None:
        """Overwrite ``data`` with that of the rank at position ``root``."""
        if self.size == 1 or not data.size:
            return
        if data.size * self.size <= SMALL or self._spread == 1 or self._lanes == 1:
            for start in range(0, data.size, LARGEST):
                part = data[start : start + LARGEST]
                self._comm.Bcast([part, self._mpi.BYTE], root)
            return
        for start in range(0, data.size, LARGEST):
            self._broadcast(data[start : start + LARGEST], root)

    def _broadcast(self, data: Bytes, root: int) -> None:
        """Scatter inside the root's host, each share to its carriers elsewhere, gather inside."""
        cuts = self._shares(data.size)
        counts = [b - a for a, b in pairwise(cuts)]
        place, home = self._places[root], self._homes[root]
        me = self._host.Get_rank()
        share = data[cuts[me] : cuts[me + 1]]
        if self._homes[self.rank] == home:
            if me == place:
                everything = [data, counts, cuts[:-1], self._mpi.BYTE]
                self._host.Scatterv(everything, self._mpi.IN_PLACE, place)
            else:
                self._host.Scatterv(None, [share, self._mpi.BYTE], place)
        if self._lane != self._mpi.COMM_NULL:
            self._lane.Bcast([share, self._mpi.BYTE], home)
        self._gather(self._host, data, cuts)

    def reduce_scatter(self, rows: Array, cuts: Sequence[int], op: str) -> Array:
        """This rank's stretch of the reduction of a 1-D array over all ranks.

        Args:
            rows: of one length on all ranks; left as it is.
            cuts: where each rank's stretch starts, and the end.
            op: see ``reductions.combine``.
        """
        mine = rows[cuts[self.rank] : cuts[self.rank + 1]]
        every = np.empty((self.size, mine.size), rows.dtype)
        width = rows.dtype.itemsize
        self._comm.Alltoallv(
            [
                rows.view(np.uint8),
                [(b - a) * width for a, b in pairwise(cuts)],
                [a * width for a in cuts[:-1]],
                self._mpi.BYTE,
            ],
            [
                _bytes(every),
                [mine.nbytes] * self.size,
                [i * mine.nbytes for i in range(self.size)],
                self._mpi.BYTE,
            ],
        )
        out = np.empty(mine.size, rows.dtype)
        combine(op, list(every), out)
        return out

    def _raw(self, values: Array) -> list[Any]:
        return [_bytes(values), self._mpi.BYTE]

    def _row(self, width: int) -> Any:
        """An MPI type of ``width`` bytes, so that counts of rows stay small."""
        return self._mpi.BYTE.Create_contiguous(width).Commit()


def _bytes(values: Array) -> Bytes:
    return values.reshape(-1).view(np.uint8)


def _cuts(length: int, parts: int) -> list[int]:
    """Where each of ``parts`` nearly equal stretches starts, and the end."""
    return [length * i // parts for i in range(parts + 1)]


def _table(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Counts and where they start."""
    starts: NDArray[np.int64] = np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.int64)
    return list(counts), starts.tolist()
