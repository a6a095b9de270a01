"""Segments: fields, segments, shares and cells tile the buffer, whatever the model looks like."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip_hvd.errors import ConfigError
from gossip_hvd.segments import ALIGN, Cell, Field, Grid, Layout, even_cuts, owner

ITEMSIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

fields_ = st.lists(
    st.builds(
        lambda dtype, size, block: Field("w", dtype, size, ITEMSIZES[dtype], block),
        st.sampled_from(sorted(ITEMSIZES)),
        st.one_of(st.integers(0, 5), st.integers(0, 400)),
        st.sampled_from(["stem", "block1", "block2", "head"]),
    ),
    max_size=12,
)
layouts = st.one_of(
    fields_.map(Layout.blocks),
    st.builds(Layout.equal, fields_, st.integers(1, 9)),
)
node_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)
largest_ = st.sampled_from([ALIGN, 3 * ALIGN, 1 << 30])


def field(size: int, dtype: str = "float32", block: str = "", name: str = "w") -> Field:
    return Field(name, dtype, size, ITEMSIZES[dtype], block)


def tiles(spans: list[tuple[int, int]], nbytes: int) -> bool:
    """Whether non-empty spans, in this order, cover 0 .. nbytes without hole or overlap."""
    return [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), nbytes]


def grids(layout: Layout, sizes: list[int], largest: int) -> list[Grid]:
    return [layout.segment_grid(sizes, largest), layout.part_grid(len(sizes), sizes)]


@given(layouts)
def test_fields_tile_the_buffer_with_less_than_a_cache_line_between(layout: Layout) -> None:
    end = 0
    for one, offset in zip(layout.fields, layout.offsets, strict=True):
        assert offset % ALIGN == 0
        assert 0 <= offset - end < ALIGN
        end = offset + one.nbytes
    assert 0 <= layout.nbytes - end < ALIGN
    assert layout.nbytes % ALIGN == 0


@given(fields_, st.integers(1, 9))
def test_no_field_is_lost(fields: list[Field], count: int) -> None:
    for layout in (Layout.blocks(fields), Layout.equal(fields, count)):
        assert sorted(map(str, layout.fields)) == sorted(map(str, fields))


@given(layouts)
def test_segments_tile_the_buffer(layout: Layout) -> None:
    assert tiles([(s.start, s.stop) for s in layout.segments], layout.nbytes)


@given(layouts)
def test_runs_tile_the_buffer_and_say_each_fields_dtype(layout: Layout) -> None:
    assert tiles([(start, stop) for start, stop, _ in layout.runs], layout.nbytes)
    for one, offset in zip(layout.fields, layout.offsets, strict=True):
        if one.nbytes:
            inside = [d for a, b, d in layout.runs if a <= offset and offset + one.nbytes <= b]
            assert inside == [one.dtype]


@given(layouts, node_sizes, largest_)
def test_cells_tile_the_buffer_exactly_once(layout: Layout, sizes: list[int], largest: int) -> None:
    for grid in grids(layout, sizes, largest):
        assert tiles([(c.start, c.stop) for c in grid.cells], layout.nbytes)
        assert all(c.nbytes > 0 for c in grid.cells)
        assert [c.index for c in grid.cells] == list(range(len(grid.cells)))
        assert sorted(c.index for cells in grid.by_unit for c in cells) == list(
            range(len(grid.cells))
        )


@given(layouts, node_sizes, largest_)
def test_a_cell_has_one_dtype_one_unit_and_one_owner_in_every_node(
    layout: Layout, sizes: list[int], largest: int
) -> None:
    for grid in grids(layout, sizes, largest):
        for cell in grid.cells:
            dtypes = {d for a, b, d in layout.runs if a < cell.stop and cell.start < b}
            assert dtypes == {cell.dtype}
            assert cell.start % ALIGN == 0
            assert cell.nbytes % ITEMSIZES[cell.dtype] == 0
            for ranks in sizes:
                share = layout.share(ranks, owner(cell, layout.nbytes, ranks))
                assert share.start <= cell.start < cell.stop <= share.stop
    for cell in layout.segment_grid(sizes, largest).cells:
        segment = layout.segments[cell.unit]
        assert segment.start <= cell.start < cell.stop <= segment.stop
        assert cell.nbytes <= largest


@given(st.integers(0, 10_000), st.integers(1, 40))
def test_shares_are_equal_within_a_cache_line(lines: int, ranks: int) -> None:
    nbytes = lines * ALIGN
    cuts = even_cuts(nbytes, ranks)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, nbytes, ranks + 1)
    lengths = [b - a for a, b in pairwise(cuts)]
    assert max(lengths) - min(lengths) <= ALIGN


@given(layouts, node_sizes)
def test_parts_are_spread_evenly_over_all_shares(layout: Layout, sizes: list[int]) -> None:
    nodes = len(sizes)
    grid = layout.part_grid(nodes, sizes)
    assert len(grid.units) == nodes
    bytes_of = [sum(c.nbytes for c in cells) for cells in grid.by_unit]
    assert max(bytes_of) - min(bytes_of) <= ALIGN * max(sizes)
    most = max(sizes)
    for j, cells in enumerate(grid.by_unit):
        carried = [0] * most
        for cell in cells:
            carried[owner(cell, layout.nbytes, most)] += cell.nbytes
        ideal = layout.nbytes / (most * nodes)
        assert all(abs(part - ideal) < 2 * ALIGN for part in carried), j


def test_blocks_keep_their_order_and_gather_their_fields() -> None:
    layout = Layout.blocks(
        [field(10, block="stem"), field(20, block="head"), field(30, block="stem", name="late")]
    )
    assert [s.name for s in layout.segments] == ["stem", "head"]
    assert [f.name for f in layout.fields] == ["w", "late", "w"]
    assert [s.nbytes for s in layout.segments] == [64 + 128, 128]


def test_a_block_of_several_dtypes_has_one_cell_for_each() -> None:
    layout = Layout.blocks(
        [
            field(40, "float32", "a"),
            field(40, "bfloat16", "a"),
            field(40, "float32", "a"),
            field(40, "bfloat16", "b"),
        ]
    )
    grid = layout.segment_grid([1])
    assert [(c.unit, c.dtype, c.nbytes) for c in grid.cells] == [
        (0, "bfloat16", 128),
        (0, "float32", 384),
        (1, "bfloat16", 128),
    ]


def test_equal_segments_ignore_where_tensors_end() -> None:
    layout = Layout.equal([field(1000), field(24)], 4)
    assert [s.nbytes for s in layout.segments] == [1024, 1024, 1024, 1088]
    assert [s.name for s in layout.segments] == ["bytes0", "bytes1", "bytes2", "bytes3"]
    assert len(Layout.equal([field(1000)], 1).segments) == 1


def test_a_large_segment_travels_in_chunks() -> None:
    layout = Layout.equal([field(1000)], 1)
    grid = layout.segment_grid([2], largest=640)
    assert [c.nbytes for c in grid.cells] == [640, 640, 640, 64, 640, 640, 640, 128]
    assert len(layout.segment_grid([2]).cells) == 2


def test_a_model_of_one_scalar() -> None:
    for layout in (Layout.blocks([field(1)]), Layout.equal([field(1)], 5)):
        assert len(layout.segments) == 1
        (cell,) = layout.segment_grid([1, 2, 5]).cells
        assert cell == Cell(0, 0, 0, ALIGN, "float32")
        owners = [owner(cell, layout.nbytes, ranks) for ranks in (1, 2, 5)]
        assert owners == [0, 1, 4]
        assert sum(len(cells) for cells in layout.part_grid(3, [1, 2, 5]).by_unit) == 1


@pytest.mark.parametrize("fields", [[], [field(0)], [field(0, block="a"), field(0, block="b")]])
def test_an_empty_model_has_nothing_to_send(fields: list[Field]) -> None:
    for layout in (Layout.blocks(fields), Layout.equal(fields, 3)):
        assert layout.nbytes == 0
        assert layout.segment_grid([1, 2]).cells == ()
        assert layout.part_grid(2, [1, 2]).by_unit == ((), ())


@pytest.mark.parametrize("count", [0, -1])
def test_less_than_one_segment_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"segments={count}")):
        Layout.equal([field(10)], count)
