"""One fault on real ranks: what goes wrong, how the job must end, and what it may leave: nothing.

A fault is data, and ``faults.py`` lists them all. Each is a launch of its own, in a folder of its
own. Several run at once, since they mostly wait.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from launch import Outcome, launch

AT_ONCE = 3
"""Launches at the same time."""

LIMIT = 200.0
"""Seconds after which a launch has failed to end by itself; a busy machine is slow to start."""

LATE = 50.0
"""Seconds after which no fault has ended a job but a sleeper of 60 that woke up."""

DRAFTS = (".tmp", ".draft")
"""Names of files that are not yet whole: of records and of checkpoints."""

PRELUDE = """
import os, signal, sys, threading, time
import torch
import gossip_hvd.torch as hvd

def tell(*words):
    # In one piece, so that ranks do not mix theirs.
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

def say():
    tell("trouble at", time.time())

def refuse(*_):
    say()
    raise LookupError("the data of rank one is gone")

def interrupt(*_):
    say()
    raise KeyboardInterrupt

def kill(number):
    say()
    os.kill(os.getpid(), number)

def later(seconds, what, *arguments):
    timer = threading.Timer(seconds, what, arguments)
    timer.daemon = True
    timer.start()

class Data(torch.utils.data.Dataset):
    def __init__(self, trouble):
        self.trouble = trouble
    def __len__(self):
        return 8000
    def __getitem__(self, i):
        if i == 80 and self.trouble:
            refuse()
        return torch.ones(3)

def train(steps, at=20, trouble=None, ranks=(1,), where="step", workers=0, width=2, pause=0.005,
          wait=False, method="gossip", options=(), **init):
    init.setdefault("node_size", 1)
    hvd.init(**init)
    mine = trouble is not None and hvd.rank() in ranks
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, width)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         model.named_parameters(), method=method, **dict(options))
    data = torch.utils.data.DataLoader(Data(mine and where == "loader"), 4, num_workers=workers)
    batches = iter(data)
    for step in range(steps):
        if mine and step == at:
            if where in ("step", "worker"):
                trouble()
            elif where == "forward":
                model.register_forward_hook(trouble)
            elif where == "backward":
                model.weight.register_hook(trouble)
            elif where == "callback":
                optimizer.register_step_post_hook(trouble)
            elif where == "skip":
                say()
                continue
            elif where == "nan":
                say()
                with torch.no_grad():
                    model.weight[0, 0] = float("nan")
        batch = next(batches) if workers else torch.ones(4, 3)
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
        time.sleep(pause)
    hvd.average_parameters(model)
    tell("trained", float(model.weight.detach().double().sum()))
"""

SOON = {"GOSSIP_HVD_STALL_TIMEOUT": "6", "GOSSIP_HVD_STALL_WARNING": "3"}
NEVER = {"GOSSIP_HVD_STALL_TIMEOUT": "300"}
TWO_NODES = "node_size=2"

RAISED = r"gossip_hvd: rank 1 raised; the job ends\.\nTraceback(.|\n)*LookupError: the data of rank"
STALLED = r"StallError: no progress for \d+ s on host \S+: rank \d \(node \d\)"
GONE = r"Rank 1 on host \S+ has left: its program ended, or called sys.exit or shutdown"
SILENT = r"Rank [123] does not answer: it is stopped, or its host or link is gone"


def differs(what: str) -> str:
    """What is said where rank 1 has other settings."""
    return rf"ConfigError: .*rank 1 and rank 0 differ in {what}"


def interrupted(rank: int, function: str = "") -> str:
    """What is said where that rank is interrupted, in or below a function."""
    raised = rf"gossip_hvd: rank {rank} raised; the job ends\.\nTraceback"
    return rf"{raised}(.|\n)* in {function}(.|\n)*\nKeyboardInterrupt"


def killed(ranks: str) -> str:
    """What the launcher says where one of these ranks, digits as in a pattern, is killed."""
    return rf"process rank [{ranks}] with PID \d+ on node \S+ exited on signal 9 \(Killed\)"


def terminated(ranks: str) -> str:
    """Likewise for SIGTERM."""
    return rf"process rank [{ranks}] with PID \d+ on node \S+ exited on signal 15 \(Terminated\)"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        what: for the table.
        body: the program behind ``PRELUDE``.
        code: exit status of the launcher.
        words: a pattern that the output must show.
        ranks: number of processes.
        environ: further variables; ``{folder}`` stands for the launch's own folder.
        launcher: see ``launch``.
        patience: likewise.
        then: a program that the same ranks run afterwards in the same folder; it must end well.
        then_words: a pattern that its output must show.
    """

    what: str
    body: str
    code: int
    words: str
    ranks: int = 2
    environ: Mapping[str, str] = field(default_factory=lambda: NEVER)
    launcher: str = "mpirun"
    patience: float = 3.0
    then: str = ""
    then_words: str = ""


@dataclass(frozen=True)
class Seen:
    """How a launch went.

    Attributes:
        outcome: of the launch.
        after: seconds from the trouble to the end.
        then: outcome of the program that was run afterwards, if there was one.
        left: what lies about at the end: shared memory, drafts, MPI's and other temporary files.
    """

    outcome: Outcome
    after: float
    then: Outcome | None
    left: tuple[str, ...]

    def wrong(self, fault: Fault) -> list[str]:
        """What is not as it should be, in words."""
        found = []
        if self.outcome.code is None:
            found.append("it had to be ended")
        elif self.outcome.code != fault.code:
            found.append(f"exit code {self.outcome.code} in place of {fault.code}")
        if fault.code and self.after > LATE:
            found.append(f"over only after {self.after:.0f} s")
        if not re.search(fault.words, self.outcome.text):
            found.append(f"nobody said {fault.words!r}")
        if self.then is not None and self.then.code != 0:
            found.append(f"afterwards: exit code {self.then.code}\n{self.then.text}")
        elif self.then is not None and not re.search(fault.then_words, self.then.text):
            found.append(f"afterwards nobody said {fault.then_words!r}\n{self.then.text}")
        processes = (*self.outcome.left, *(self.then.left if self.then else ()))
        if processes or self.left:
            found.append(f"left behind: processes {processes}, files {self.left}")
        return found


def run(fault: Fault) -> Seen:
    """Launch it, with all files of MPI, PyTorch and Python in folders of its own."""
    before = _torch_memory()
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as shared,
    ):
        folder, temporary = Path(name), Path(name) / "tmp"
        temporary.mkdir()
        places = {
            "TMPDIR": str(temporary),
            "TORCHINDUCTOR_CACHE_DIR": "{folder}/cache",  # is kept by design
            "OMPI_MCA_btl_vader_backing_directory": shared,
            "GOSSIP_HVD_RECORD_DIR": "{folder}/records",
            "FOLDER": "{folder}",
        }
        environ = {k: v.format(folder=folder) for k, v in {**places, **fault.environ}.items()}
        options = {
            "launcher": fault.launcher,
            "limit": LIMIT,
            "environ": environ,
            "patience": fault.patience,
        }
        started = time.time()
        outcome = launch(PRELUDE + fault.body, fault.ranks, **options)
        ended = started + outcome.seconds
        then = launch(PRELUDE + fault.then, fault.ranks, **options) if fault.then else None
        began = re.findall(r"trouble at ([0-9.]+)", outcome.out)
        after = ended - float(min(began)) if began else float("nan")
        drafts = [p for p in folder.rglob("*") if p.suffix in DRAFTS]
        # A Python that is killed leaves the folder of its multiprocessing.
        others = [p for p in temporary.iterdir() if not p.name.startswith("pymp-")]
        left = [*Path(shared).iterdir(), *drafts, *others, *_torch_memory() - before]
        return Seen(outcome, after, then, tuple(map(str, left)))


def _torch_memory() -> set[Path]:
    """PyTorch's shared memory of processes that have ended: ``torch_<process>_<more>``."""
    found = ((p, p.name.split("_")[1]) for p in Path("/dev/shm").glob("torch_*_*"))
    return {p for p, process in found if not _lives(process)}


def _lives(process: str) -> bool:
    """Whether a process is there; one that has ended and waits for its parent has no command."""
    try:
        return bool(Path("/proc", process, "cmdline").read_bytes())
    except OSError:
        return False


def run_all(faults: Sequence[Fault]) -> Iterator[tuple[Fault, Seen]]:
    """Run several at once; in their order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from zip(faults, pool.map(run, faults), strict=True)
