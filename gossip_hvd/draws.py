"""Random numbers as a pure function of (seed, round, segment, index), the same on every machine.

A stream of random numbers has a hidden position: a rank that skips a step, or resumes from a
checkpoint, loses its place and with it the peers. Here every number has an address instead, so
any rank can ask for any round directly.

The number at an address is SplitMix64's (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014): with G = 0x9E3779B97F4A7C15 and all arithmetic modulo 2^64,

    key  = mix(mix(mix(seed + G) + G + round) + G + segment)
    word = mix(key + (index + 1) G)

Only integer operations are used, so every platform agrees bit by bit. The vectorised functions
give, number for number, what the scalar ones give. `tests/golden/draws.json` pins both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gossip_hvd.errors import ConfigError

Words: TypeAlias = npt.NDArray[np.uint64]
Integers: TypeAlias = npt.NDArray[np.int64]

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
LARGEST_BOUND = 2**32 - 1

# Small numpy calls cost about the same whatever their size, so derangements are tried several at
# once: at most 8 (all 16 segments then succeed in two batches or fewer, mostly) and 8192 words,
# which still fit the cache. The result does not depend on it.
_BATCH = 8192
_MOST_TRIES = 8


def mix(word: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers that changes half the bits."""
    word &= MASK
    word = (word ^ (word >> 30)) * MIX_1 & MASK
    word = (word ^ (word >> 27)) * MIX_2 & MASK
    return word ^ (word >> 31)


def key(seed: int, round: int, segment: int) -> int:
    """The 64-bit key of one segment in one round; arguments count modulo 2^64."""
    return mix(_round_key(seed, round) + int(segment))


def word(seed: int, round: int, segment: int, index: int) -> int:
    """The 64-bit random word at one address."""
    return mix(key(seed, round, segment) + (index + 1) * GAMMA)


def uniform_integer(bound: int, seed: int, round: int, segment: int, index: int = 0) -> int:
    """A uniform integer in [0, bound), bound < 2^32.

    It is floor(word * bound / 2^64): each value's probability differs from 1/bound by less than
    2^-64 (by less than 2^-50 of itself for bound <= 2^14).

    Raises:
        ConfigError: `bound` is outside 1 .. 2^32 - 1.
    """
    _require_bound(bound)
    return word(seed, round, segment, index) * bound >> 64


def words(seed: int, round: int, segments: Sequence[int], count: int, start: int = 0) -> Words:
    """Random words of several segments: shape (len(segments), count), indices from `start`.

    `segments` are integers in [0, 2^64).
    """
    keys = np.array(segments, dtype=np.uint64)
    keys += _round_key(seed, round)
    _mix_in_place(keys)
    return _mix_in_place(keys[:, None] + _steps(start, count))


def uniform_integers(
    bound: int, seed: int, round: int, segments: Sequence[int], count: int = 1, start: int = 0
) -> Integers:
    """Uniform integers in [0, bound): shape (len(segments), count); see `uniform_integer`."""
    _require_bound(bound)
    drawn = words(seed, round, segments, count, start)
    # The high half of the 96-bit product, from its two 64-bit parts.
    high, low = (drawn >> 32) * bound, (drawn & 0xFFFFFFFF) * bound
    return ((high + (low >> 32)) >> 32).view(np.int64)


def permutations(n: int, seed: int, round: int, segments: Sequence[int]) -> Integers:
    """One uniform random permutation of range(n) a segment: shape (len(segments), n).

    The labels are sorted by their random words. The lowest b = bit_length(n - 1) bits of a word
    give way to the label, which makes all words different and the sort's result unique; two
    labels tie in the other bits, and then keep their order, with probability < n^2 / 2^(65-b)
    (2^-35 for n = 1024).
    """
    return _ranked(words(seed, round, segments, n))


def permutation(n: int, seed: int, round: int, segment: int = 0) -> list[int]:
    """One uniform random permutation of range(n) in plain Python; see `permutations`."""
    low = (n - 1).bit_length()
    base = key(seed, round, segment)
    ranks = [mix(base + (label + 1) * GAMMA) >> low for label in range(n)]
    return sorted(range(n), key=ranks.__getitem__)


def derangements(n: int, seed: int, round: int, segments: Sequence[int]) -> Integers:
    """One uniform random permutation without fixed points a segment: shape (S, n).

    By rejection: attempt a uses the words a n .. a n + n - 1 of its segment; the first attempt
    without a fixed point stands (probability about 1/e each).

    Raises:
        ConfigError: n < 2, for which no derangement exists.
    """
    if n < 2:
        raise ConfigError(f"a derangement of {n} node(s) does not exist: two or more are needed")
    found: Integers = np.empty((len(segments), n), dtype=np.int64)
    pending, attempt = np.arange(len(segments)), 0
    here = np.arange(n)
    while pending.size:
        tries = max(1, min(_MOST_TRIES, _BATCH // (pending.size * n)))
        names = [segments[place] for place in pending.tolist()]
        drawn = words(seed, round, names, tries * n, start=attempt * n)
        offered = _ranked(drawn.reshape(pending.size, tries, n))
        good = (offered != here).all(axis=2)
        done = good.any(axis=1)
        found[pending[done]] = offered[done, good[done].argmax(axis=1)]
        pending, attempt = pending[~done], attempt + tries
    return found


def derangement(n: int, seed: int, round: int, segment: int = 0) -> list[int]:
    """One uniform random derangement of range(n); see `derangements`."""
    return [int(label) for label in derangements(n, seed, round, (segment,))[0]]


def _round_key(seed: int, round: int) -> int:
    """What the keys of a round's segments share; `int` keeps numpy integers from overflowing."""
    return (mix(mix(int(seed) + GAMMA) + GAMMA + int(round)) + GAMMA) & MASK


def _require_bound(bound: int) -> None:
    if not 1 <= bound <= LARGEST_BOUND:
        raise ConfigError(f"a bound for random integers must be in 1 .. 2^32 - 1, got {bound}")


def _mix_in_place(drawn: Words) -> Words:
    """`mix` on every element, overwriting the array."""
    drawn ^= drawn >> 30
    drawn *= MIX_1
    drawn ^= drawn >> 27
    drawn *= MIX_2
    drawn ^= drawn >> 31
    return drawn


@lru_cache(maxsize=32)
def _steps(start: int, count: int) -> Words:
    """(index + 1) G for the indices start .. start + count - 1."""
    steps = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    steps *= GAMMA
    steps.flags.writeable = False
    return steps


def _ranked(drawn: Words) -> Integers:
    """The labels 0 .. n-1 in the order of their words, along the last axis; overwrites `drawn`."""
    n = drawn.shape[-1]
    low = 2 ** (n - 1).bit_length() - 1
    drawn &= MASK - low
    drawn |= np.arange(n, dtype=np.uint64)
    drawn.sort(axis=-1)
    drawn &= low
    return drawn.view(np.int64)
