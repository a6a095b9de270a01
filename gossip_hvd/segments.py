"""Cut a model's flat buffer: fields laid end to end, segments to gossip, cells to send.

All parameters of a model live (or are copied) in one flat buffer of bytes. Three cuts of it
matter, each a list of byte offsets:

* *segments*: what gets a peer of its own; one, equal bytes, or the model's blocks;
* *shares*: equal byte ranges, one a local rank, so that every rank of a node uses the wire;
* *cells*: the common refinement of both, of changes of dtype and of a largest message size. A
  cell has one segment, one dtype and, whatever the size of a node, one owner in it; it is what
  travels as one message and what is mixed at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from gossip_hvd.errors import ConfigError

ALIGN = 64
"""Fields, shares and cells start at multiples of this many bytes (a cache line)."""

LARGEST_MESSAGE = 1 << 30
"""Bytes; MPI-3 libraries refuse counts of 2 GiB and more."""


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of the model.

    Attributes:
        name: the parameter's name.
        dtype: its NumPy name, such as ``"float32"`` or ``"bfloat16"``.
        size: number of elements.
        itemsize: bytes of one element.
        block: the block of the model it belongs to; fields of one block share a segment.
    """

    name: str
    dtype: str
    size: int
    itemsize: int
    block: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, padding not counted."""
        return self.size * self.itemsize


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes ``start <= b < stop`` of the flat buffer, with a name."""

    start: int
    stop: int
    name: str = ""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Cell:
    """The smallest piece of the flat buffer that travels and is mixed on its own.

    Attributes:
        index: position in its grid.
        unit: the segment (or part) it belongs to.
        start: first byte.
        stop: byte after the last.
        dtype: NumPy name of its elements.
    """

    index: int
    unit: int
    start: int
    stop: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Grid:
    """The cells of one way to cut the buffer into units."""

    cells: tuple[Cell, ...]
    units: tuple[str, ...]

    @cached_property
    def by_unit(self) -> tuple[tuple[Cell, ...], ...]:
        """The cells of each unit, in order."""
        found: list[list[Cell]] = [[] for _ in self.units]
        for cell in self.cells:
            found[cell.unit].append(cell)
        return tuple(tuple(cells) for cells in found)


@dataclass(frozen=True)
class Layout:
    """Where every field lies in the flat buffer, and how the buffer is cut into segments.

    Attributes:
        fields: the tensors, in the buffer's order.
        offsets: the first byte of each field.
        nbytes: bytes of the whole buffer, padding included.
        segments: consecutive spans that cover the buffer.
    """

    fields: tuple[Field, ...]
    offsets: tuple[int, ...]
    nbytes: int
    segments: tuple[Span, ...]

    @classmethod
    def blocks(cls, fields: Sequence[Field]) -> Layout:
        """One segment for each block, in the order in which blocks first appear."""
        if not fields:
            return cls((), (), 0, ())
        order = {name: i for i, name in enumerate(dict.fromkeys(f.block for f in fields))}
        ordered = sorted(fields, key=lambda f: (order[f.block], f.dtype))
        offsets, nbytes = _offsets(ordered)
        starts = [
            offsets[i] for i, f in enumerate(ordered) if not i or f.block != ordered[i - 1].block
        ]
        spans = zip(starts, [*starts[1:], nbytes], order, strict=True)
        return cls(tuple(ordered), offsets, nbytes, tuple(Span(*span) for span in spans))

    @classmethod
    def equal(cls, fields: Sequence[Field], count: int) -> Layout:
        """``count`` segments of equally many bytes, wherever tensors begin and end.

        Raises:
            ConfigError: where ``count`` is less than 1.
        """
        if count < 1:
            raise ConfigError(f"segments={count}: a model is cut into 1 segment or more.")
        ordered = sorted(fields, key=lambda f: f.dtype)
        offsets, nbytes = _offsets(ordered)
        cuts = even_cuts(nbytes, count)
        spans = tuple(Span(a, b, f"bytes{i}") for i, (a, b) in enumerate(pairwise(cuts)) if b > a)
        return cls(tuple(ordered), offsets, nbytes, spans)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, str], ...]:
        """Maximal ranges (start, stop, dtype) of one dtype."""
        runs: list[tuple[int, int, str]] = []
        ends = (*self.offsets, self.nbytes)[1:]
        for field, start, stop in zip(self.fields, self.offsets, ends, strict=True):
            if runs and runs[-1][2] == field.dtype:
                runs[-1] = (runs[-1][0], stop, field.dtype)
            else:
                runs.append((start, stop, field.dtype))
        return tuple(runs)

    def share(self, ranks: int, index: int) -> Span:
        """The bytes that local rank ``index`` of a node of ``ranks`` ranks carries."""
        cuts = even_cuts(self.nbytes, ranks)
        return Span(cuts[index], cuts[index + 1])

    def segment_grid(self, node_sizes: Iterable[int], largest: int = LARGEST_MESSAGE) -> Grid:
        """The cells of the segments.

        Args:
            node_sizes: the numbers of ranks that nodes have in this job.
            largest: bytes of the largest cell.
        """
        return self._grid(self.segments, range(len(self.segments)), node_sizes, largest)

    def part_grid(self, parts: int, node_sizes: Iterable[int]) -> Grid:
        """The cells of ``parts`` equal parts; part j is spread evenly over all shares.

        A node's part is strided over the buffer, once a share of the largest node, so that all
        ranks of its node take part in reducing it.
        """
        sizes = set(node_sizes)
        cuts = even_cuts(self.nbytes, parts * max(sizes, default=1))
        spans = [Span(a, b) for a, b in pairwise(cuts)]
        grid = self._grid(spans, [i % parts for i in range(len(spans))], sizes, LARGEST_MESSAGE)
        return Grid(grid.cells, tuple(f"part {j}" for j in range(parts)))

    def _grid(
        self, spans: Sequence[Span], units: Sequence[int], node_sizes: Iterable[int], largest: int
    ) -> Grid:
        cuts = {0, self.nbytes}
        cuts.update(start for start, _, _ in self.runs)
        for ranks in set(node_sizes):
            cuts.update(even_cuts(self.nbytes, ranks))
        cells: list[Cell] = []
        run_starts = [start for start, _, _ in self.runs]
        inner = sorted(cuts)
        for span, unit in zip(spans, units, strict=True):
            own = {span.start, span.stop}
            own.update(inner[bisect_right(inner, span.start) : bisect_right(inner, span.stop)])
            edges = sorted(own)
            for a, b in pairwise(edges):
                dtype = self.runs[bisect_right(run_starts, a) - 1][2]
                for start in range(a, b, largest):
                    cells.append(Cell(len(cells), unit, start, min(b, start + largest), dtype))
        return Grid(tuple(cells), tuple(span.name for span in spans))


def even_cuts(nbytes: int, count: int) -> tuple[int, ...]:
    """``count + 1`` offsets that cut ``nbytes`` into equal ranges, at multiples of ``ALIGN``.

    The last offset is ``nbytes`` itself; ranges of a small buffer may be empty.
    """
    return (*(i * nbytes // count // ALIGN * ALIGN for i in range(count)), nbytes)


def owner(cell: Cell, nbytes: int, ranks: int) -> int:
    """The local rank, of ``ranks``, whose share holds ``cell`` of a buffer of ``nbytes``."""
    return bisect_right(even_cuts(nbytes, ranks), cell.start, hi=ranks) - 1


def _offsets(fields: Sequence[Field]) -> tuple[tuple[int, ...], int]:
    """The aligned offset of every field, and the bytes of all."""
    offsets, end = [], 0
    for field in fields:
        offsets.append(end)
        end += -(-field.nbytes // ALIGN) * ALIGN
    return tuple(offsets), end
