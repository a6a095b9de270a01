"""Bitwise resume: 2k steps are k steps, a kill, a restore in new processes, k steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from resume_job import CASES, MERGED, OPTIONS

from gossip_hvd.methods import METHODS

PROGRAM = Path(__file__).with_name("resume_job.py")

SHAPES = {"3 nodes of 1": (3, 1), "2 nodes of 2": (4, 2)}
"""Ranks, and ranks a node."""

Verdicts = dict[tuple[str, str, str], list[str]]


def test_every_registered_method_is_resumed() -> None:
    assert set(OPTIONS) == set(METHODS)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """What failed, by shape, phase and configuration; an entry for every rank."""
    found: Verdicts = {}
    folders = {shape: tmp_path_factory.mktemp("job") for shape in SHAPES}

    def run(shape: str, phase: str, of: str) -> None:
        ranks, node_size = SHAPES[shape]
        environ = {"PYTHONWARNINGS": "ignore"}
        outcome = launch(
            PROGRAM, ranks, phase, str(folders[of]), str(node_size), limit=300, environ=environ
        )
        # The first phase does not end, it is killed.
        assert (outcome.code == 0) == (phase != "save"), outcome.text
        assert not outcome.left
        assert ("every node starts from the mean" in outcome.text) == (phase == "merge")
        for rank in range(ranks):
            for line in (folders[of] / f"{phase}{rank}.jsonl").read_text().splitlines():
                case, failure = json.loads(line)
                found.setdefault((of, phase, case), []).append(failure)

    for shape in SHAPES:
        run(shape, "save", shape)
        run(shape, "resume", shape)
    run("2 nodes of 2", "merge", "3 nodes of 1")
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_killed_job_goes_on_to_the_bit(shape: str, case: Any, verdicts: Verdicts) -> None:
    ranks, _ = SHAPES[shape]
    for phase in ("save", "resume"):
        assert verdicts[shape, phase, str(case)] == [""] * ranks


@pytest.mark.parametrize("case", MERGED)
def test_a_job_of_another_shape_starts_from_the_mean(case: str, verdicts: Verdicts) -> None:
    assert verdicts["3 nodes of 1", "merge", case] == [""] * 4
