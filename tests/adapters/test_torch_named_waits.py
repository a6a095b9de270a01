"""Named operations that lack a rank: one that has left, stands in a debugger, or was stopped."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from launch import Outcome, launch

PRELUDE = """
import os, pdb, signal, sys, time
import torch
import gossip_hvd.torch as hvd
from gossip_hvd import session

class Slow:
    def readline(self):
        time.sleep(15)
        return "continue\\n"

def debug():
    pdb.Pdb(stdin=Slow(), stdout=sys.stderr, nosigint=True).set_trace()

def stop(seconds):
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)

hvd.init(node_size=1)
"""


@dataclass(frozen=True)
class Case:
    """One launch: its program behind ``PRELUDE``, and how it must end."""

    body: str
    ranks: int = 3
    code: int = 0
    says: tuple[str, ...] = ()
    printed: int = 0
    environ: dict[str, str] = field(default_factory=lambda: {"GOSSIP_HVD_STALL_TIMEOUT": "300"})


LEFT = "lacks ranks [{}], which have left: their program ended, or called sys.exit or shutdown."
LEAVE = """
if hvd.rank() == {0}:
    sys.exit(0)
hvd.allreduce(torch.ones({1}), name="late")
print("done")
"""
SOON = {"GOSSIP_HVD_STALL_TIMEOUT": "6", "GOSSIP_HVD_STALL_WARNING": "3"}

CASES = {
    "a rank has left": Case(
        LEAVE.format(1, 3), code=1, says=("allreduce 'torch.late' " + LEFT.format(1),)
    ),
    "the coordinator's own program has ended": Case(
        LEAVE.format(0, 100_000), code=1, says=("allreduce 'torch.late' " + LEFT.format(0),)
    ),
    "a rank has left, and others join": Case(
        "if hvd.rank() == 1:\n    sys.exit(0)\nhvd.join()\nprint('done')",
        code=1,
        says=("join " + LEFT.format(1),),
    ),
    "a rank has left without waiting for what it asked for": Case(
        "ones = torch.ones(2_000_000)\n"
        "if hvd.rank() == 1:\n"
        "    hvd.allreduce_async(ones, name='early', op=hvd.Sum)\n"
        "    hvd.shutdown()\n"
        "    sys.exit(0)\n"
        "time.sleep(8)\n"
        "assert hvd.allreduce(ones, name='early', op=hvd.Sum)[-1] == 3\n"
        "print('done')",
        printed=2,
    ),
    "a rank in a debugger": Case(
        "hvd.rank() == 1 and debug()\nhvd.allreduce(torch.ones(3))\nprint('done')",
        printed=3,
        environ=SOON,
    ),
    "a rank in a debugger, at a distance": Case(
        "two = hvd.add_process_set([2, 3])\n"
        "if hvd.rank() == 3:\n"
        "    debug()\n"
        "if hvd.rank() > 1:\n"
        "    hvd.allreduce(torch.ones(3), process_set=two)\n"
        "hvd.allreduce(torch.ones(3))\n"
        "print('done')",
        ranks=4,
        printed=4,
        environ=SOON,
    ),
    "the coordinator's process was stopped": Case(
        "hvd.rank() == 0 and stop(12)\nhvd.allreduce(torch.ones(3))\nprint('done')",
        printed=3,
        environ={"GOSSIP_HVD_STALL_TIMEOUT": "9"},
    ),
    "a letter is damaged": Case(
        "hvd.allreduce(torch.ones(3))\n"
        "if hvd.rank() == 2:\n"
        "    session.current().operations._letters._post.send(0, b'[' * 40)\n"
        "time.sleep(60)",
        code=1,
        says=(
            "gossip_hvd: rank 0 raised; the job ends.",
            "ProtocolError: rank 2 sent 40 bytes that are no letter of named operations: a head",
        ),
    ),
    "a rank computes for too long": Case(
        "hvd.rank() == 2 and time.sleep(60)\nhvd.allreduce(torch.ones(3), name='x')",
        code=1,
        says=(
            "allreduce 'torch.x' has waited 6 s for ranks [2]; ranks [0, 1] are ready.",
            "waits for nobody: it is at <string>:",
        ),
        environ=SOON,
    ),
}


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """All launches that are asked for, three at a time: they mostly wait."""
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
        if "callspec" in vars(item)
    ]

    def run(name: str) -> Outcome:
        case = CASES[name]
        return launch(PRELUDE + case.body, case.ranks, limit=100, environ=case.environ)

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(wanted, pool.map(run, wanted), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_named_operation_that_lacks_a_rank(name: str, seen: dict[str, Outcome]) -> None:
    outcome, case = seen[name], CASES[name]
    assert outcome.code == case.code, outcome.text
    assert outcome.out.count("done") == case.printed, outcome.text
    for words in case.says:
        assert words in outcome.err, outcome.text
    assert outcome.left == ()


def test_sigterm_leaves_the_record_of_the_latest_session(tmp_path: object) -> None:
    body = """
hvd.shutdown()
hvd.init(node_size=1)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    environ = {"GOSSIP_HVD_RECORD_DIR": str(tmp_path)}
    outcome = launch(PRELUDE + body, 1, launcher="python", limit=60, environ=environ)
    assert outcome.code in (143, -15), outcome.text
    with open(f"{tmp_path}/rank00000.jsonl") as file:
        head = json.loads(file.readline())
    assert (head["state"], head["why"][:7]) == ("computing", "SIGTERM")
