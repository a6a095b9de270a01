"""A short form of ``steady.py``: nothing grows in some hundred steps and a few starts."""

from __future__ import annotations

from steady import steady


def test_nothing_grows() -> None:
    outcome = steady(400, 12)
    assert (outcome.code, outcome.left) == (0, ()), outcome.text
    assert outcome.out.count("steady") == 4, outcome.text
