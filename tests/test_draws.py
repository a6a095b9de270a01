"""Draws: known values, scalar = vectorised, any address directly, uniformity, the golden file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip_hvd import draws
from gossip_hvd.errors import ConfigError
from gossip_hvd.topology import TOPOLOGIES

GOLDEN = Path(__file__).parent / "golden" / "draws.json"
ADDRESSES = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 2**40, 17), (2**64 - 1, 9, 2**63)]

seeds = st.integers(-(2**70), 2**70)
rounds = st.integers(0, 2**63)
lists_of_segments = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5)


def computed() -> dict[str, object]:
    """Everything the golden file pins; `python -m tests.test_draws` writes it anew."""
    return {
        "words": [[str(draws.word(*at, index)) for index in range(3)] for at in ADDRESSES],
        "integers": [draws.uniform_integer(1000, *at, index=5) for at in ADDRESSES],
        "permutations": [draws.permutation(7, *at) for at in ADDRESSES],
        "derangements": [draws.derangement(5, *at) for at in ADDRESSES],
        # Whom node 3 of 8 receives from and sends to: rounds 0, 1 and 1000, segments 0 and 1.
        "plans": {
            name: [
                [[peer for peer, _ in met.receives], [peer for peer, _ in met.sends]]
                for round in (0, 1, 1000)
                for met in kind().plan(3, 8, 2012, round, 2)
            ]
            for name, kind in TOPOLOGIES.items()
        },
    }


def chi_square(counts: list[int], shares: list[float]) -> float:
    total = sum(counts)
    return sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, shares, strict=True))


def test_golden_file() -> None:
    assert json.loads(json.dumps(computed())) == json.loads(GOLDEN.read_text())


def test_words_are_splitmix64() -> None:
    # The generator's published first outputs for the state 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [draws.mix(1234567 + (i + 1) * draws.GAMMA) for i in range(3)] == published


@given(seeds, rounds, lists_of_segments, st.integers(0, 100))
def test_vectorised_words_are_the_scalar_ones(
    seed: int, round: int, segments: list[int], start: int
) -> None:
    many = draws.words(seed, round, segments, 4, start)
    assert many.tolist() == [
        [draws.word(seed, round, s, start + i) for i in range(4)] for s in segments
    ]


@given(seeds, rounds, lists_of_segments, st.integers(1, draws.LARGEST_BOUND))
def test_vectorised_integers_are_the_scalar_ones(
    seed: int, round: int, segments: list[int], bound: int
) -> None:
    many = draws.uniform_integers(bound, seed, round, segments, count=3, start=2)
    assert many.tolist() == [
        [draws.uniform_integer(bound, seed, round, s, 2 + i) for i in range(3)] for s in segments
    ]
    assert many.min() >= 0
    assert many.max() < bound


@settings(max_examples=50)
@given(st.integers(1, 70), seeds, rounds, lists_of_segments)
def test_vectorised_permutations_are_the_scalar_ones(
    n: int, seed: int, round: int, segments: list[int]
) -> None:
    many = draws.permutations(n, seed, round, segments)
    assert many.tolist() == [draws.permutation(n, seed, round, s) for s in segments]
    assert (np.sort(many, axis=1) == np.arange(n)).all()


@settings(max_examples=50)
@given(st.integers(2, 70), seeds, rounds, lists_of_segments)
def test_derangements_do_not_depend_on_company(
    n: int, seed: int, round: int, segments: list[int]
) -> None:
    many = draws.derangements(n, seed, round, segments)
    assert many.tolist() == [draws.derangement(n, seed, round, s) for s in segments]
    assert (np.sort(many, axis=1) == np.arange(n)).all()
    assert (many != np.arange(n)).all()


@pytest.mark.parametrize("batch", [1, 10, 2048])
def test_a_derangement_is_the_first_attempt_without_fixed_point(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "_BATCH", batch)  # how many attempts are drawn at a time
    n, seed = 5, 3
    for segment in range(50):
        attempt = 0
        while True:
            words = [draws.word(seed, 8, segment, attempt * n + i) >> 3 for i in range(n)]
            order = sorted(range(n), key=words.__getitem__)
            if all(order[i] != i for i in range(n)):
                break
            attempt += 1
        assert draws.derangement(n, seed, 8, segment) == order


def test_any_round_directly() -> None:
    in_order = [draws.permutation(9, 5, round) for round in range(40)]
    backwards = [draws.permutation(9, 5, round) for round in reversed(range(40))]
    assert in_order == backwards[::-1]
    assert len({tuple(order) for order in in_order}) == 40


def test_numpy_integers_are_integers() -> None:
    with np.errstate(all="raise"):
        got = draws.word(np.int64(-3), np.int64(4), np.int64(5), 6)  # type: ignore[arg-type]
    assert got == draws.word(-3, 4, 5, 6)


@pytest.mark.parametrize("bound", [0, -1, 2**32])
def test_impossible_bounds_are_refused(bound: int) -> None:
    with pytest.raises(ConfigError, match="bound"):
        draws.uniform_integer(bound, 0, 0, 0)
    with pytest.raises(ConfigError, match="bound"):
        draws.uniform_integers(bound, 0, 0, [0])


def test_one_node_has_no_derangement() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        draws.derangement(1, 0, 0)


def test_every_bit_is_fair_and_neighbours_are_independent() -> None:
    # 4000 words over rounds and segments; 5 standard deviations of a fair coin.
    by_round = np.concatenate([draws.words(1, r, range(40), 1)[:, 0] for r in range(100)])
    bits = (by_round[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    limit = 5 * 0.5 / np.sqrt(len(bits))
    assert np.abs(bits.mean(axis=0) - 0.5).max() < limit
    for distance in (1, 40):  # the next segment, the next round
        same = (bits[distance:] == bits[:-distance]).mean(axis=0)
        assert np.abs(same - 0.5).max() < limit * 1.02


@pytest.mark.parametrize(("bound", "limit"), [(3, 18.4), (10, 33.7), (24, 55.5)])
def test_integers_are_uniform(bound: int, limit: float) -> None:
    # Chi-square below its 1 - 1e-4 quantile for bound - 1 degrees of freedom; fixed seed.
    drawn = draws.uniform_integers(bound, 11, 0, range(200), count=100)
    counts = np.bincount(drawn.ravel(), minlength=bound).tolist()
    assert chi_square(counts, [1 / bound] * bound) < limit


def test_permutations_are_uniform() -> None:
    # 24 permutations of four: chi-square below its 1 - 1e-4 quantile for 23 degrees of freedom.
    counts = Counter(map(tuple, draws.permutations(4, 11, 0, range(24_000)).tolist()))
    assert len(counts) == 24
    assert chi_square(list(counts.values()), [1 / 24] * 24) < 55.5


def test_derangements_are_uniform() -> None:
    # The nine derangements of four: 1 - 1e-4 quantile of chi-square for 8 degrees of freedom.
    counts = Counter(map(tuple, draws.derangements(4, 11, 0, range(18_000)).tolist()))
    assert len(counts) == 9
    assert chi_square(list(counts.values()), [1 / 9] * 9) < 31.8


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(computed(), indent=1) + "\n")
