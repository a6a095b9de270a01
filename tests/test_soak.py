"""A few dozen seeded runs of every method with faults; ``make soak`` runs a thousand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import soak

from gossip_hvd.methods import METHODS
from gossip_hvd.transport.faults import HARMFUL, HARMLESS, Faults

SEEDS = range(36)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_faults_are_put_right_or_named(name: str) -> None:
    seen = {soak.run(name, seed) for seed in SEEDS}
    # Without messages nothing can be lost.
    assert seen >= {"named", "same after faults"} or name == "none"


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_repeats_a_run_exactly(seed: int) -> None:
    case = soak.case_of("crossover", seed)
    faults = Faults(seed, dict.fromkeys(HARMLESS, 0.2))
    assert soak.trained(case, faults, seed) == soak.trained(case, faults, seed)


@pytest.mark.parametrize("kind", HARMLESS)
def test_every_harmless_fault_happens_and_is_put_right(kind: str) -> None:
    case = soak.case_of("crossover", 1)
    found, hit = soak.trained(case, Faults(1, {kind: 0.3}), 1)
    assert hit > 5
    assert found == soak.expected(case)


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_lost_or_cut_message_is_named_or_was_not_needed(kind: str) -> None:
    case = soak.case_of("crossover", 1)
    errors = 0
    for number in range(12):
        try:
            found, _ = soak.trained(case, Faults(schedule={number: kind}), 1)
        except (soak.StallError, soak.PeerLostError) as error:
            assert "rank " in str(error)
            errors += 1
        else:
            assert found == soak.expected(case)
    assert errors


def test_what_differs_in_silence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soak itself: another result is no good one."""
    monkeypatch.setattr(soak, "expected", lambda case: [b""])
    monkeypatch.setattr(soak, "faults_of", lambda case, seed: Faults())
    with pytest.raises(AssertionError, match=r"silently another result(.|\n)*--seed 5"):
        soak.run("crossover", 5)


def test_a_named_error_needs_a_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Faults(schedule={3: "drop"})
    monkeypatch.setattr(
        soak, "trained", lambda case, faults, order: (_ for _ in ()).throw(soak.StallError("rank"))
    )
    monkeypatch.setattr(soak, "faults_of", lambda case, seed: replace(drop, schedule={}))
    with pytest.raises(AssertionError, match="an error without a cause"):
        soak.run("crossover", 5)
