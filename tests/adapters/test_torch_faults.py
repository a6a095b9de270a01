"""Every fault of ``faults.py`` on real ranks: named, over in seconds, and nothing left behind."""

from __future__ import annotations

import pytest
from fault import Fault, Seen, run_all
from faults import ALL


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest) -> dict[str, Seen]:
    """All launches that are asked for, several at a time."""
    wanted = [
        item.callspec.params["fault"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
    ]
    return {fault.what: found for fault, found in run_all(wanted)}


@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.what.replace(" ", "-"))
def test_fault(fault: Fault, seen: dict[str, Seen]) -> None:
    found = seen[fault.what]
    assert not found.wrong(fault), found.outcome.text
