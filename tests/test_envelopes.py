"""Letters of named operations: what is written is read again, and nothing else is believed."""

from __future__ import annotations

import json
import struct
import tracemalloc
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip_hvd.envelopes import (
    DTYPES,
    NUMBERED,
    decode_requests,
    decode_responses,
    encode_requests,
    encode_responses,
)
from gossip_hvd.errors import ProtocolError
from gossip_hvd.mixing import dtype_of
from gossip_hvd.negotiation import Coordinator
from gossip_hvd.requests import KINDS, OPS, Request, Response
from gossip_hvd.small import is_small, nbytes, packed

SIZE = 3
SENDER = 1

names = st.text(max_size=6)
numbers = st.integers(-(1 << 40), 1 << 40)
counts = st.integers(0, 1 << 40)
shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=2).map(tuple)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any request that ``submit`` could make."""
    kind = draw(st.sampled_from([kind for kind in KINDS if kind != "watch"]))
    tensors = kind in KINDS[:5]
    shape = draw(shapes) if tensors else ()
    if kind == "alltoall":
        shape = ((4, 2),)
    dtypes = tuple(draw(st.sampled_from(sorted(DTYPES))) for _ in shape)
    count = NUMBERED.get(kind)
    splits = st.lists(numbers, min_size=count or 0, max_size=3 if count is None else count)
    made = Request(
        kind,
        draw(names),
        draw(st.integers(0, 3)),
        shape,
        dtypes,
        draw(st.sampled_from(OPS)) if kind in KINDS[:2] else "",
        draw(st.integers(-1, SIZE - 1)),
        draw(st.floats(allow_nan=False)),
        draw(st.floats(allow_nan=False)),
        tuple(draw(splits)),
    )
    zeros = [
        np.zeros(prod(s) * dtype_of(d).itemsize, np.uint8)
        for s, d in zip(shape, dtypes, strict=True)
    ]
    return packed(made, zeros, SENDER)


@given(st.lists(requests(), max_size=4))
def test_requests_are_read_as_they_were_written(written: list[Request]) -> None:
    read = decode_requests(SENDER, encode_requests(written))
    assert read == written
    assert [one.values for one in read] == [one.values for one in written]


@given(st.lists(requests(), max_size=4), st.lists(st.lists(counts, max_size=2), max_size=2))
def test_responses_are_read_as_they_were_written(written: list[Request], rows: Any) -> None:
    made = [
        Response(
            Request(*one.terms),
            "" if one.values else "an error",
            tuple(map(tuple, rows)),
            (i,),
            i + 1,
            one.values,
        )
        for i, one in enumerate(written)
    ]
    assert decode_responses(0, encode_responses(made)) == made


# Anything else -----------------------------------------------------------------------------------

anything: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@st.composite
def mutilated(draw: st.DrawFn) -> bytes:
    """A letter with some bytes changed, cut out or put in."""
    out = bytearray(encode_requests(draw(st.lists(requests(), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(out)))
        out[start : start + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(out)


@st.composite
def with_a_foreign_field(draw: st.DrawFn) -> bytes:
    """A letter of which one field holds anything."""
    letter = encode_requests([draw(requests())])
    head = letter[: letter.index(b"[[")]
    (fields,) = json.loads(letter[len(head) :])
    fields[draw(st.integers(0, len(fields) - 1))] = draw(anything)
    return head + json.dumps([fields]).encode()


@st.composite
def with_a_foreign_head(draw: st.DrawFn) -> bytes:
    head = draw(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=5))
    return struct.pack(f"<{len(head)}q", *head) + draw(st.binary(max_size=40))


letters = (
    st.binary(max_size=100)
    | mutilated()
    | with_a_foreign_field()
    | with_a_foreign_head()
    | anything.map(lambda v: struct.pack("<q", 0) + json.dumps(v).encode())
    | anything.map(lambda v: struct.pack("<3q", 1, 0, 0) + json.dumps([v]).encode())
    | st.just(struct.pack("<q", 0) + b"[" * 100_000)
)


def by_its_root(one: Request, rank: int) -> Request:
    """A broadcast as its root asks for it, whose values the sender cannot have sent."""
    wanted = one.kind == "broadcast" and rank == one.root and is_small(one)
    return one._replace(values=bytes(sum(nbytes(one)))) if wanted else one


@settings(max_examples=1000)
@given(letters)
def test_any_bytes_are_requests_which_the_coordinator_can_take_or_are_refused(
    data: bytes,
) -> None:
    try:
        found = decode_requests(SENDER, data)
    except ProtocolError as error:
        assert str(error).startswith(f"rank {SENDER} sent {len(data)} bytes that are no letter")
        assert len(str(error)) < 600
        return
    coordinator = Coordinator(SIZE, limit=10)
    # That which another rank asked for too, else it would only wait.
    for rank in (0, 2, SENDER):
        coordinator.announce(rank, [by_its_root(one, rank) for one in found], 0)
    for rank in range(SIZE):
        responses = coordinator.outgoing[rank]
        assert decode_responses(0, encode_responses(responses)) == responses


@settings(max_examples=1000)
@given(letters | requests().map(lambda one: encode_responses([Response(one, values=one.values)])))
def test_any_bytes_are_responses_or_refused(data: bytes) -> None:
    try:
        decode_responses(0, data)
    except ProtocolError as error:
        assert "rank 0 sent" in str(error)


@pytest.mark.parametrize("count", [1 << 62, 1 << 40, 1 << 28, -1, -(1 << 63)])
def test_no_room_is_made_for_what_a_letter_only_claims(count: int) -> None:
    tracemalloc.start()
    try:
        for data in (
            struct.pack("<q", count) + bytes(64),
            struct.pack("<3q", 1, 0, count) + bytes(64),
        ):
            for decode in (decode_requests, decode_responses):
                with pytest.raises(ProtocolError):
                    decode(SENDER, data)  # type: ignore[operator]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_values_of_another_length_than_their_shapes_are_refused() -> None:
    one = Request("allreduce", "x", shapes=((2, 3),), dtypes=("float32",), op="sum", values=b"123")
    with pytest.raises(ProtocolError, match="allreduce with 3 bytes in place of 24"):
        decode_requests(SENDER, encode_requests([one]))
    with pytest.raises(ProtocolError, match="allreduce with 0 bytes in place of 24"):
        decode_responses(0, encode_responses([Response(Request(*one.terms))]))


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (
            Request("allreduce", "x", shapes=((2,),), dtypes=("O",), op="sum"),
            "allreduce of 1 times",
        ),
        (Request("allgather", "x", shapes=((2,),), dtypes=("x",)), "allgather of 1 times"),
        (Request("allgather", "x", shapes=((2,),)), r"allgather of 1 times \(\)"),
        (Request("alltoall", "x"), "alltoall of 0 tensors"),
        (Request("join", "join"), "a request of join"),
        (Request("remove_process_set", "x", splits=(1, 2)), "a request of remove_process_set"),
        (Request("watch", "watch"), "a request of watch"),
        (Request("allreduce", "x", op="xor"), "'xor' in place of one of"),
        (Request("barrier", "x", shapes=((-1,),)), "-1 in place of a whole number"),
        (Request("barrier", "x", splits=(1 << 60,)), "in place of a whole number"),
    ],
)
def test_what_no_rank_asks_for_is_refused_with_its_reason(one: Request, why: str) -> None:
    with pytest.raises(ProtocolError, match=f"rank {SENDER} sent .*{why}"):
        decode_requests(SENDER, encode_requests([one]))


def test_who_has_joined_after_which_step_is_two_numbers() -> None:
    for splits in ((), (1,), (1, 2, 3)):
        letter = encode_responses([Response(Request("watch", "watch", splits=splits))])
        with pytest.raises(ProtocolError, match="a response of watch"):
            decode_responses(0, letter)


def test_a_process_set_that_does_not_exist_is_an_error_on_all_ranks() -> None:
    coordinator = Coordinator(2, limit=10)
    for rank in (0, 1):
        coordinator.announce(rank, [Request("remove_process_set", "r", splits=(7,))], 0)
        coordinator.announce(rank, [Request("add_process_set", "a", splits=(0, 5))], 0)
    for rank in (0, 1):
        errors = [response.error for response in coordinator.outgoing[rank]]
        assert errors[0] == "There is no process set 7."
        assert errors[1].startswith("A process set of ranks [0, 5]; there are ranks [0, 1].")
