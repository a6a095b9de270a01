"""The coordinator and what it finds wrong, without any rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from gossip_hvd.envelopes import (
    decode_requests,
    decode_responses,
    encode_requests,
    encode_responses,
)
from gossip_hvd.execution import Executor
from gossip_hvd.joining import Steps
from gossip_hvd.mixing import Array, dtype_of
from gossip_hvd.negotiation import SHUT_DOWN, Coordinator
from gossip_hvd.reductions import combine, neutral, scale
from gossip_hvd.requests import OPS, Request
from gossip_hvd.small import deliver, is_small, nbytes, packed


def wanted(name: str, kind: str = "allreduce", **changes: object) -> Request:
    plain = Request(kind, name, shapes=((2, 3),), dtypes=("float32",), op="sum")
    made = plain._replace(**changes)
    zeros = np.zeros(sum(nbytes(made)), np.uint8)
    return packed(made, [zeros], 0) if made.kind == "allreduce" and not made.values else made


def told(coordinator: Coordinator, rank: int) -> list[tuple[str, str]]:
    found = [(r.request.name, r.error) for r in coordinator.outgoing[rank]]
    coordinator.outgoing[rank].clear()
    return found


def test_different_orders_on_different_ranks_become_one() -> None:
    coordinator = Coordinator(3, limit=10)
    coordinator.announce(0, [wanted("a"), wanted("b"), wanted("c")], 0)
    coordinator.announce(1, [wanted("c"), wanted("a"), wanted("b")], 0)
    assert told(coordinator, 0) == []
    coordinator.announce(2, [wanted("b"), wanted("c"), wanted("a")], 0)
    orders = [told(coordinator, rank) for rank in range(3)]
    assert orders[0] == orders[1] == orders[2] == [("b", ""), ("c", ""), ("a", "")]
    assert coordinator.idle


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"shapes": ((3, 2),)},
            r"Mismatched allreduce tensor shapes: .* shape \[2, 3\], but .* \[3, 2\]",
        ),
        ({"dtypes": ("int32",)}, "Mismatched data types: One rank had type float32, but .* int32"),
        ({"op": "max"}, "Mismatched reduction ops"),
        ({"prescale": 2.0}, "Mismatched prescale and/or postscale factors"),
        ({"kind": "allgather"}, "One rank did an allreduce, but another rank did an allgather"),
        ({"shapes": ((2, 3), (1,)), "dtypes": ("float32",) * 2}, "Mismatched allreduce groups"),
    ],
)
def test_what_differs_is_said_to_all(changes: dict[str, object], sentence: str) -> None:
    coordinator = Coordinator(2, limit=10)
    coordinator.announce(0, [wanted("x")], 0)
    coordinator.announce(1, [wanted("x")._replace(**changes)], 0)
    for rank in range(2):
        ((name, error),) = told(coordinator, rank)
        assert name == "x"
        with pytest.raises(AssertionError, match=sentence):
            raise AssertionError(error)
        assert "'x': ranks 0 and 1" in error


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (wanted("x", "broadcast", root=5), "root rank 5, which is none of ranks"),
        (wanted("x", "allgather", shapes=((),)), "rank-zero tensor"),
        (wanted("x", "alltoall", splits=(2, 1)), "Sum of splits entries is greater"),
        (wanted("x", "alltoall", splits=(1,)), "1 splits for 2 ranks"),
        (wanted("x", "alltoall", shapes=((3,),)), "not divisible"),
    ],
)
def test_what_cannot_be_is_refused(request_: Request, sentence: str) -> None:
    coordinator = Coordinator(2, limit=10)
    for rank in range(2):
        coordinator.announce(rank, [request_], 0)
    for rank in range(2):
        assert sentence in told(coordinator, rank)[0][1]


def test_a_stalled_name_is_warned_about_then_fails_also_for_those_who_come_late() -> None:
    coordinator = Coordinator(3, limit=300)
    coordinator.announce(0, [wanted("slow")], 0)
    coordinator.announce(2, [wanted("slow")], 5)
    coordinator.look(59)
    assert not coordinator.warnings
    coordinator.look(61)
    coordinator.look(62)
    assert len(coordinator.warnings) == 1
    assert "'slow' has waited 61 s for ranks [1]; ranks [0, 2] are ready" in coordinator.warnings[0]
    coordinator.look(301)
    error = told(coordinator, 0)[0][1]
    assert "for ranks [1]" in error
    assert told(coordinator, 2) == [("slow", error)]
    coordinator.announce(1, [wanted("slow")], 400)
    assert told(coordinator, 1) == [("slow", error)]
    # The next use of the name is a new one.
    for rank in range(3):
        coordinator.announce(rank, [wanted("slow")], 500)
    assert told(coordinator, 1) == [("slow", "")]


def test_who_has_joined_is_not_waited_for() -> None:
    coordinator = Coordinator(3, limit=10)
    coordinator.announce(0, [wanted("x")], 0)
    coordinator.announce(1, [Request("join", "join", splits=(1,))], 0)
    coordinator.announce(2, [wanted("x")], 0)
    (response,) = coordinator.outgoing[1]
    assert response.joined == (1,)
    assert response.request.shapes == ((2, 3),)
    coordinator.outgoing[1].clear()
    coordinator.announce(2, [Request("join", "join", splits=(1,))], 0)
    coordinator.announce(0, [wanted("t", "alltoall", shapes=((3, 2),))], 0)
    assert "not supported with Join" in told(coordinator, 0)[-1][1]
    coordinator.announce(0, [Request("join", "join", splits=(1,))], 0)
    assert coordinator.outgoing[1][-1].rows == ((1, 2, 0),), "ranks in the order of joining"


def test_an_error_for_some_ranks_parts_nothing_that_travels_together_on_others() -> None:
    coordinator = Coordinator(3, limit=10)
    large = [wanted(name, shapes=((1000,),)) for name in ("x", "y")]
    for rank in (0, 2):
        coordinator.announce(rank, [wanted("slow")], 0)
    coordinator.look(11)
    for rank in (0, 2):
        coordinator.outgoing[rank].clear()
        coordinator.announce(rank, large, 12)
    # Rank 1 comes late to what has failed, and is told so between the two others.
    coordinator.announce(1, [large[0], wanted("slow"), large[1]], 13)
    batches = [
        [[r.request.name for r in batch] for batch in Executor.batches(coordinator.outgoing[rank])]
        for rank in range(3)
    ]
    assert batches[0] == batches[2] == [["x", "y"]]
    assert batches[1] == [["slow"], ["x", "y"]]


def followed(coordinator: Coordinator, rank: int) -> list[str]:
    responses = coordinator.outgoing[rank]
    names = [r.request.name for r in responses if r.request.kind in ("steps", "watch")]
    coordinator.outgoing[rank].clear()
    return names


def joined(rank: int, last: int) -> Request:
    return Request("watch", "watch", splits=(rank, last))


def test_who_has_joined_follows_every_step_of_the_others() -> None:
    steps = [Steps() for _ in range(3)]
    coordinator = Coordinator(3, limit=10)
    for rank, count in enumerate((2, 3, 3)):
        for i in range(count):
            steps[rank].add("dg"[i % 2])
    coordinator.announce(0, [steps[0].report("join")], 0)
    assert followed(coordinator, 0) == []
    assert followed(coordinator, 1) == followed(coordinator, 2) == ["watch"]
    coordinator.announce(1, [steps[1].note(joined(0, 2))], 0)
    assert followed(coordinator, 0) == [], "nobody follows before all know"
    coordinator.announce(2, [steps[2].note(joined(0, 2))], 0)
    assert followed(coordinator, 0) == ["d"]
    coordinator.announce(2, [steps[2].add("g")], 0)
    coordinator.announce(1, [steps[1].report("join")], 0)
    assert followed(coordinator, 0) == ["g"]
    assert followed(coordinator, 1) == [], "rank 2 does not know of rank 1 yet"
    coordinator.announce(2, [steps[2].note(joined(1, 3))], 0)
    assert followed(coordinator, 1) == ["g"]
    coordinator.announce(2, [steps[2].report("join")], 0)
    for rank in range(3):
        assert coordinator.outgoing[rank][-1].rows == ((0, 1, 2),)


def left(kind: str, ranks: list[int]) -> str:
    return (
        f"{kind} lacks ranks {ranks}, which have left: their program ended, or called sys.exit or "
        f"shutdown. {SHUT_DOWN}"
    )


LEAVE = Request("shutdown", "shutdown")


def test_who_leaves_fails_what_waits_for_it() -> None:
    coordinator = Coordinator(2, limit=10)
    coordinator.announce(0, [wanted("x")], 0)
    coordinator.announce(1, [LEAVE], 0)
    assert told(coordinator, 0) == [("x", left("allreduce 'x'", [1]))]
    coordinator.announce(0, [wanted("y")], 0)
    assert told(coordinator, 0) == [("y", left("allreduce 'y'", [1]))]
    coordinator.announce(0, [LEAVE], 0)
    assert told(coordinator, 1) == [("shutdown", "")]


def test_what_a_rank_asked_for_before_it_left_is_carried_out() -> None:
    coordinator = Coordinator(3, limit=10)
    coordinator.announce(1, [wanted("x"), LEAVE], 0)
    for rank in (0, 2):
        coordinator.announce(rank, [wanted("x")], 50)
    assert [told(coordinator, rank) for rank in range(3)] == [[("x", "")]] * 3


def test_who_has_left_is_not_missed_by_process_sets_without_it() -> None:
    coordinator = Coordinator(3, limit=10)
    for rank in range(3):
        coordinator.announce(rank, [Request("add_process_set", "s", splits=(0, 2))], 0)
    coordinator.announce(1, [LEAVE], 0)
    for rank in (0, 2):
        coordinator.announce(rank, [wanted("x", members=1)], 0)
    assert [told(coordinator, rank)[1:] for rank in (0, 2)] == [[("x", "")]] * 2


def test_nobody_joins_a_rank_that_has_left() -> None:
    coordinator = Coordinator(3, limit=10)
    join = Request("join", "join", splits=(1,))
    coordinator.announce(0, [join], 0)
    coordinator.announce(1, [LEAVE], 0)
    coordinator.announce(2, [join], 0)
    for rank in (0, 2):
        *_, response = coordinator.outgoing[rank]
        assert (response.request.name, response.error) == ("join", left("join", [1]))
        assert response.order == 0, "not all ranks are told"
    coordinator.announce(0, [LEAVE], 0)
    coordinator.announce(2, [LEAVE], 0)
    assert coordinator.outgoing[1][-1].request.kind == "shutdown"


def test_who_is_awaited_is_known_and_what_is_known_of_it_is_said() -> None:
    coordinator = Coordinator(4, limit=10, warn=5, known=lambda ranks: f"{ranks} sleep.")
    coordinator.announce(0, [wanted("x"), wanted("y")], 0)
    coordinator.announce(2, [wanted("x")], 2)
    coordinator.announce(1, [wanted("y"), wanted("z")], 3)
    assert coordinator.awaited(0) == ()
    assert coordinator.awaited(1) == (1, 2, 3)
    assert coordinator.awaited(4) == (0, 1, 2, 3)
    coordinator.look(6)
    assert coordinator.warnings[0].endswith("STALL_TIMEOUT seconds. [1, 3] sleep.")
    coordinator.look(11)
    assert told(coordinator, 2)[0][1].endswith("[1, 3] sleep.")


def test_process_sets_are_numbered_and_duplicates_refused() -> None:
    coordinator = Coordinator(3, limit=10)
    adding = Request("add_process_set", "s", splits=(0, 2))
    for rank in range(3):
        coordinator.announce(rank, [adding], 0)
    assert coordinator.outgoing[1][-1].rows == ((1,),)
    for rank in range(3):
        coordinator.announce(rank, [adding._replace(name="again")], 0)
    assert "duplicate process set" in told(coordinator, 1)[-1][1]
    coordinator.announce(0, [wanted("x", members=1)], 0)
    coordinator.announce(2, [wanted("x", members=1)], 0)
    assert told(coordinator, 2)[-1] == ("x", "")
    assert told(coordinator, 1) == []
    for rank in range(3):
        coordinator.announce(rank, [Request("remove_process_set", "r", splits=(1,))], 0)
    coordinator.announce(0, [wanted("x", members=1)], 0)
    assert "does not exist" in told(coordinator, 0)[-1][1]


def test_letters_arrive_as_they_were_sent() -> None:
    requests = [
        wanted("ä", "alltoall", splits=(1, 1)),
        wanted("b", values=b"\0}\xff," * 6),
        Request("join", "join", splits=(1, 0)),
    ]
    read = decode_requests(0, encode_requests(requests))
    assert read == requests
    assert [one.values for one in read] == [b"", b"\0}\xff," * 6, b""]
    others = [requests[0], wanted("b", values=b"1234" * 6), requests[2]]
    assert decode_requests(0, encode_requests(others))[1].values == b"1234" * 6, "texts are kept"
    coordinator = Coordinator(1, limit=10)
    coordinator.announce(0, requests, 0)
    responses = coordinator.outgoing[0]
    assert decode_responses(0, encode_responses(responses)) == responses
    assert [one.order for one in responses] == [1, 2, 3]
    responses[1] = responses[1]._replace(values=b"[]" * 12)
    assert decode_responses(0, encode_responses(responses)) == responses


def shares(dtype: str, ranks: int) -> list[Array]:
    return [np.array([1, rank + 1, 2, 3, 1, 2]).astype(dtype_of(dtype)) for rank in range(ranks)]


def small_result(coordinator: Coordinator, request: Request, rows: Mapping[int, Array]) -> Array:
    for rank, row in rows.items():
        coordinator.announce(rank, [packed(request, [row], rank)], 0)
    results = [coordinator.outgoing[rank].pop() for rank in range(3)]
    assert results[0] == results[1] == results[2]
    out = np.empty(6, dtype_of(request.dtypes[0]))
    deliver(results[0], [out])
    return out


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int32"])
def test_what_is_small_is_reduced_where_it_is_agreed(op: str, dtype: str) -> None:
    rows = dict(enumerate(shares(dtype, 3)))
    request = wanted("x", dtypes=(dtype,), op=op, prescale=2.0, postscale=0.5)
    found = small_result(Coordinator(3, limit=10), request, rows)
    twice = np.array([2 * row.astype(float) for row in rows.values()])
    means = {"sum": np.sum, "average": np.mean, "min": np.min, "max": np.max, "product": np.prod}
    np.testing.assert_array_equal(found.astype(float), means[op](twice, axis=0) / 2)


def test_a_rank_that_has_joined_adds_nothing_to_what_is_small() -> None:
    coordinator = Coordinator(3, limit=10)
    coordinator.announce(1, [Request("join", "join", splits=(1,))], 0)
    for rank in (0, 2):
        coordinator.outgoing[rank].clear()
    rows = shares("float32", 3)
    request = wanted("x", op="average")
    found = small_result(coordinator, request, {0: rows[0], 2: rows[2]})
    np.testing.assert_allclose(found, (rows[0] + rows[2]) / 3)


def test_a_small_broadcast_is_its_roots() -> None:
    rows = dict(enumerate(shares("float32", 3)))
    request = wanted("x", "broadcast", op="", root=2)
    assert packed(request, [rows[0]], 0).values == b""
    assert small_result(Coordinator(3, limit=10), request, rows).tolist() == rows[2].tolist()


@pytest.mark.parametrize(("elements", "small"), [(0, False), (1, True), (256, True), (257, False)])
def test_what_is_small_is_said_by_the_request_alone(elements: int, small: bool) -> None:
    request = wanted("x", shapes=((elements,),))
    assert is_small(request) == small
    assert bool(packed(request, [np.ones(elements, np.float32)], 0).values) == small
    assert not is_small(request._replace(kind="allgather"))


DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_and_what_changes_nothing_in_them(
    dtype: str, random: np.random.Generator
) -> None:
    kind = dtype_of(dtype)
    rows = [random.integers(0, 4, 70_001).astype(kind) for _ in range(3)]
    wide = np.stack(rows).astype(float)
    expected = {"sum": wide.sum(0), "min": wide.min(0), "max": wide.max(0), "product": wide.prod(0)}
    for op, values in expected.items():
        idle = np.empty_like(rows[0])
        neutral(op, idle)
        out = np.empty_like(rows[0])
        combine(op, [*rows, idle], out)
        assert (out == values.astype(kind)).all(), op


def test_a_mean_of_whole_numbers_is_exact_where_it_exists() -> None:
    for dtype in ("int32", "uint8", "float16", "bfloat16", "float32"):
        values = np.array([49, 98, 0], dtype_of(dtype))
        scale(values, 1.0, 49)
        assert values.tolist() == [1, 2, 0]
    values = np.array([7, -7], np.int64)
    scale(values, 1.0, 2)
    assert values.tolist() == [3, -3]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_what_is_too_large_becomes_infinite_in_silence(dtype: str) -> None:
    """Where warnings are errors, as here, one would end the thread that computes."""
    values = np.full(3, 60_000 if dtype == "float16" else 3e38, dtype_of(dtype))
    scale(values, 1e300)
    assert not np.isfinite(values).any() or dtype == "float64"
    combine("sum", [values, values], values)
    scale(values, 1e300)
    assert not np.isfinite(values).any()
