"""Mixing: both forms against float64, and what they keep: the sum, the mean, the bits."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip_hvd.mixing import BLOCK, Array, accumulator, combine, dtype_of, mean

DTYPES = ("float32", "float64", "float16", "bfloat16")
WEIGHTS = ((0.5,), (0.25,), (1 / 3, 1 / 3), (0.1, 0.2, 0.3))
SIZES = (0, 1, 100, BLOCK, BLOCK + 1, 2 * BLOCK + 7)

# Half a unit in the last place, relative: the error of one rounding.
HALF_ULP = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def draw(random: np.random.Generator, dtype: str, *shape: int) -> Array:
    return random.standard_normal(shape).astype(dtype_of(dtype))


def wide(values: Array) -> Array:
    return values.astype(np.float64)


def reference(now: Array, sent: Array, received: list[Array], weights: tuple[float, ...]) -> Array:
    change = sum((w * (wide(r) - wide(sent)) for r, w in zip(received, weights, strict=True)), 0.0)
    return wide(now) + change


def tolerance(dtype: str, now: Array, received: list[Array]) -> float:
    """A rounding of the result, and one of each sum and product in the accumulator's dtype."""
    largest = max([1e-30, *(float(np.abs(wide(x)).max(initial=0)) for x in (now, *received))])
    each = HALF_ULP[accumulator(dtype_of(dtype)).name]
    return largest * (1.01 * HALF_ULP[dtype] + (3 + 4 * len(received)) * each)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_form_is_a_weighted_mean(
    random: np.random.Generator, dtype: str, weights: tuple[float, ...], size: int
) -> None:
    now, *received = draw(random, dtype, 1 + len(weights), size)
    out = np.full(size, 7, dtype_of(dtype))
    combine(now, now, received, weights, out)
    off = np.abs(wide(out) - reference(now, now, received, weights))
    assert out.dtype == dtype_of(dtype)
    assert off.max(initial=0) <= tolerance(dtype, now, received)


@pytest.mark.parametrize("wire", ["bfloat16", "float16", None])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_late_form_adds_differences_to_what_is_held_now(
    random: np.random.Generator, dtype: str, weights: tuple[float, ...], wire: str | None
) -> None:
    now = draw(random, dtype, BLOCK + 7)
    sent, *received = draw(random, wire or dtype, 1 + len(weights), BLOCK + 7)
    out = np.empty_like(now)
    combine(now, sent, received, weights, out)
    off = np.abs(wide(out) - reference(now, sent, received, weights))
    assert off.max() <= 2 * tolerance(dtype, now, [sent, *received])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_may_overwrite_what_was_held(
    random: np.random.Generator, dtype: str, late: bool
) -> None:
    for weights in WEIGHTS:
        now, sent, *received = draw(random, dtype, 2 + len(weights), BLOCK + 5)
        kept = [x.tobytes() for x in (sent, *received)]
        apart = np.empty_like(now)
        combine(now, sent if late else now, received, weights, apart)
        combine(now, sent if late else now, received, weights, now)
        assert now.tobytes() == apart.tobytes()
        assert [x.tobytes() for x in (sent, *received)] == kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_changes_between_equals(random: np.random.Generator, dtype: str) -> None:
    x = draw(random, dtype, 1000)
    for weights in WEIGHTS:
        for sent in (x, x.copy()):
            out = np.empty_like(x)
            combine(x, sent, [x.copy() for _ in weights], weights, out)
            if sent is not x or set(weights) <= {0.5, 0.25}:
                assert out.tobytes() == x.tobytes()
            np.testing.assert_allclose(wide(out), wide(x), rtol=4 * HALF_ULP[dtype])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_changes_where_nobody_is_met(
    random: np.random.Generator, dtype: str, late: bool
) -> None:
    now, sent = draw(random, dtype, 2, 1000)
    out = np.full_like(now, np.nan)
    combine(now, sent if late else now, [], [], out)
    assert out.tobytes() == now.tobytes()


def test_half_and_half_is_the_same_for_both() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1000)).astype(np.float32)
    to_a, to_b = np.empty_like(a), np.empty_like(a)
    combine(a, a, [b], [0.5], to_a)
    combine(b, b, [a], [0.5], to_b)
    assert to_a.tobytes() == to_b.tobytes()
    assert to_a.tobytes() == ((a + b) / 2).tobytes()


dyadic = st.integers(-(2**15), 2**15).map(float)
drift = st.integers(-64, 64).map(float)


@given(
    st.lists(st.tuples(dyadic, drift), min_size=2, max_size=7),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.sampled_from(["float32", "float64"]),
    st.integers(1, 6),
)
def test_late_mixing_keeps_the_sum_exactly_where_float_holds_it(
    nodes: list[tuple[float, float]], wire: str, dtype: str, distance: int
) -> None:
    """Whole numbers below 2^15: nothing but the wire rounds, and the wire must not matter."""
    n = len(nodes)
    snapshot = np.array([x for x, _ in nodes], dtype_of(dtype))
    now = snapshot + np.array([d for _, d in nodes], dtype_of(dtype))
    on_wire = snapshot.astype(dtype_of(wire))
    if not np.isfinite(on_wire.astype(np.float64)).all():
        return
    after = np.empty_like(now)
    for i in range(n):
        j = (i + distance) % n
        here, there = on_wire[i : i + 1], on_wire[j : j + 1]
        combine(now[i : i + 1], here, [there], [0.5], after[i : i + 1])
    assert sum(map(Fraction, after.tolist())) == sum(map(Fraction, now.tolist()))


extreme = st.one_of(
    st.floats(-(2.0**120), 2.0**120, width=32),
    st.sampled_from([0.0, -0.0, 2.0**-149, 2.0**-126, 2.0**120, -(2.0**120)]),
)


@given(st.lists(st.tuples(extreme, extreme), min_size=2, max_size=6), st.integers(1, 5))
def test_late_mixing_keeps_the_sum_to_stated_rounding_at_the_extremes(
    nodes: list[tuple[float, float]], distance: int
) -> None:
    """Two roundings a node: of the difference, and of the result; each half a unit of its own."""
    n = len(nodes)
    now = np.array([x for x, _ in nodes], np.float32)
    sent = np.array([s for _, s in nodes], ml_dtypes.bfloat16)
    after = np.empty_like(now)
    for i in range(n):
        j = (i + distance) % n
        combine(now[i : i + 1], sent[i : i + 1], [sent[j : j + 1]], [0.5], after[i : i + 1])
    sums = [sum(map(Fraction, x.astype(np.float64).tolist()), Fraction(0)) for x in (now, after)]
    exact = [Fraction(float(x)) for x in sent]
    half_ulp, tiny = Fraction(1, 2**24), Fraction(1, 2**150)
    bounds = [
        half_ulp * (abs(exact[(i + distance) % n] - exact[i]) / 2 + abs(Fraction(float(after[i]))))
        + 3 * tiny
        for i in range(n)
    ]
    assert abs(sums[1] - sums[0]) <= sum(bounds, Fraction(0))


def test_float32_takes_differences_of_16_bit_values_exactly_within_16_binades() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((2, 5000)) * 2.0 ** rng.integers(-6, 6, (2, 5000))).astype(
        ml_dtypes.bfloat16
    )
    out, zero = np.empty(5000, np.float32), np.zeros(5000, np.float32)
    combine(zero, x[0], [x[1]], [0.5], out)
    exact = (wide(x[1]) - wide(x[0])) / 2
    near = np.abs(np.log2(np.abs(wide(x[1]) / wide(x[0])))) < 15
    assert near.sum() > 4000
    assert (wide(out) == exact)[near].all()


@pytest.mark.parametrize(("n", "weight"), [(2, 0.3), (2, 1 / 3), (3, 1 / 3), (5, 1 / 5)])
def test_roundings_cancel_in_the_mean(random: np.random.Generator, n: int, weight: float) -> None:
    """Also of weights that float32 rounds, so that a row sums to 1 + 3e-8."""
    x = random.uniform(1, 2, (n, 100_000)).astype(np.float32)
    after = np.empty_like(x)
    for i in range(n):
        others = [x[j] for j in range(n) if j != i]
        combine(x[i], x[i], others, [weight] * len(others), after[i])
    growth = wide(after).sum() / wide(x).sum() - 1
    assert abs(growth) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_mean_is_summed_in_double_and_rounded_once(
    random: np.random.Generator, dtype: str, n: int
) -> None:
    values = list(draw(random, dtype, n, BLOCK + 3))
    total = sum((wide(v) for v in values), np.zeros(BLOCK + 3))
    expected = (total / n).astype(dtype_of(dtype))
    out = np.empty_like(values[0])
    mean(values, out)
    assert out.tobytes() == expected.tobytes()
    mean(values, values[-1])
    assert values[-1].tobytes() == expected.tobytes()


def test_mean_of_large_values_does_not_overflow() -> None:
    top = np.full(3, np.finfo(np.float32).max)
    out = np.empty(3, np.float32)
    mean([top, top, top], out)
    assert (out == top).all()


def test_names_of_dtypes() -> None:
    assert dtype_of("bfloat16") == ml_dtypes.bfloat16
    assert dtype_of("float32") == np.float32
    assert [accumulator(dtype_of(d)).name for d in DTYPES] == [
        "float32",
        "float64",
        "float32",
        "float32",
    ]
