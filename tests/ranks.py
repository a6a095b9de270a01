"""Tests whose body runs on every rank of a real job: ``@on_ranks(...)``.

A test file that uses it is read twice. pytest reads it to list tests, one for each check and each
``Job``; the ranks read it to find the bodies. All checks that need the same number of ranks share
one launch, because starting Python, PyTorch and MPI costs far more than a check. Each check has an
``init`` and a ``shutdown`` of its own. Where one fails, its launch ends, and the checks behind it
get a new one.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from launch import Outcome, launch

PATIENCE = 150.0
"""Seconds that one check may take on all ranks together."""


ADAPTERS = {
    "torch": ("gossip_hvd.torch", {}),
    "tensorflow": ("gossip_hvd.keras", {"KERAS_BACKEND": "tensorflow"}),
    "keras-torch": ("gossip_hvd.keras", {"KERAS_BACKEND": "torch"}),
}
"""The adapter that a job starts, and the environment that it needs."""


@dataclass(frozen=True)
class Job:
    """How one check is started.

    Attributes:
        ranks: number of processes.
        scope: of ``init``.
        node_size: of ``init``.
        adapter: a key of ``ADAPTERS``.
    """

    ranks: int
    scope: str = "node"
    node_size: int | None = 1
    adapter: str = "torch"

    def __str__(self) -> str:
        beneath = "" if self.adapter == "torch" else f"-{self.adapter}"
        return f"{self.ranks}x{self.node_size or 'host'}-{self.scope}{beneath}"

    @property
    def nodes(self) -> list[list[int]]:
        """World ranks of every node."""
        size = self.node_size or self.ranks
        return [list(range(a, min(a + size, self.ranks))) for a in range(0, self.ranks, size)]


ALONE = [Job(1), Job(1, "world")]
PAIRS = [Job(2), Job(2, "world"), Job(4, "node", 2), Job(4, "world", 2)]
"""Two nodes of equal size."""
UNEVEN = [Job(5, "node", 2), Job(5, "world", 2), Job(5, "node", 3)]
ODD = [Job(5), Job(4), Job(4, "world")]
ONE_NODE = [Job(2, "node", 2), Job(4, "world", None)]
ALL = [*ALONE, *ONE_NODE, *PAIRS, *ODD, *UNEVEN]
BOTH_SCOPES = [Job(4, "node", 2), Job(4, "world", 2)]


def on_ranks(jobs: Sequence[Job], *, bare: bool = False) -> Callable[[Callable[..., None]], Any]:
    """Run a test's body on every rank of a job.

    Args:
        jobs: the test is repeated for each.
        bare: True to leave ``init`` to the body.
    """

    def decorate(body: Callable[..., None]) -> Any:
        @pytest.mark.parametrize("job", jobs, ids=str)
        def test(job: Job, request: pytest.FixtureRequest) -> None:
            failures = _verdicts(request, job.ranks, job.adapter)[request.node.nodeid]
            if failures:
                pytest.fail(failures, pytrace=False)

        functools.update_wrapper(test, body, assigned=("__name__", "__module__", "__doc__"))
        del test.__wrapped__
        test.body, test.bare = body, bare  # type: ignore[attr-defined]
        return test

    return decorate


_known: dict[tuple[int, str], dict[str, str]] = {}


def _verdicts(request: pytest.FixtureRequest, ranks: int, adapter: str) -> dict[str, str]:
    """By test, what failed on which rank; nothing for a check that passed everywhere."""
    if (ranks, adapter) not in _known:
        todo = [
            {
                "id": item.nodeid,
                "file": str(item.path),
                "check": item.originalname,
                "job": asdict(item.callspec.params["job"]),
            }
            for item in request.session.items
            if isinstance(item, pytest.Function)
            and hasattr(item.function, "body")
            and item.callspec.params["job"].ranks == ranks
            and item.callspec.params["job"].adapter == adapter
        ]
        _known[ranks, adapter] = _run(ranks, ADAPTERS[adapter][1], todo)
    return _known[ranks, adapter]


def _run(ranks: int, environ: dict[str, str], todo: list[dict[str, Any]]) -> dict[str, str]:
    verdicts: dict[str, str] = {}
    while rest := [entry for entry in todo if entry["id"] not in verdicts]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "todo.json").write_text(json.dumps(rest))
            program = Path(__file__).with_name("rank.py")
            limit = 60 + PATIENCE * len(rest)
            outcome = launch(program, ranks, folder, limit=limit, environ=environ)
            new = _read(folder, ranks, rest, outcome)
        assert new, f"no check was even started:\n{outcome.text}"
        verdicts.update(new)
    return verdicts


def _read(folder: str, ranks: int, todo: list[dict[str, Any]], outcome: Outcome) -> dict[str, str]:
    """Verdicts of all checks that were run; those after a failure were not."""
    said: list[dict[str, str]] = []
    for rank in range(ranks):
        file = Path(folder) / f"rank{rank}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        said.append({entry["id"]: entry["failure"] for entry in map(json.loads, lines)})
    verdicts: dict[str, str] = {}
    for entry in todo:
        mine = [one.get(entry["id"]) for one in said]
        if all(failure == "" for failure in mine):
            verdicts[entry["id"]] = ""
            continue
        lines = [f"rank {r}: {f or 'did not finish'}" for r, f in enumerate(mine) if f != ""]
        verdicts[entry["id"]] = "\n".join([*lines, f"exit code {outcome.code}", outcome.text])
        return verdicts
    if outcome.code != 0 or outcome.left:
        last = todo[-1]["id"]
        verdicts[last] = f"exit code {outcome.code}, left {outcome.left}\n{outcome.text}"
    return verdicts
