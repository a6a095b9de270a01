"""Faults on real ranks as data: what goes wrong where, how the job must end, and what is said.

    python tests/adapters/faults.py [WORDS]     the table of docs/guarantees.md, as seen here

Each case is a launch of its own. Several run at once, since they mostly wait.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import Outcome, launch

AT_ONCE = 3
"""Launches at the same time."""

LIMIT = 100.0
"""Seconds after which a launch has failed to end by itself."""

PRELUDE = """
import os, signal, sys, threading, time
import torch
import gossip_hvd.torch as hvd

def say():
    print("trouble at", time.time(), flush=True)

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
            if where == "step":
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
        batch = next(batches) if where == "loader" else torch.ones(4, 3)
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
        time.sleep(pause)
    hvd.average_parameters(model)
    print("trained", float(model.weight.detach().double().sum()), flush=True)
"""

SOON = {"GOSSIP_HVD_STALL_TIMEOUT": "6", "GOSSIP_HVD_STALL_WARNING": "3"}
NEVER = {"GOSSIP_HVD_STALL_TIMEOUT": "300"}
TWO_NODES = "node_size=2"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        what: for the table.
        body: the program behind ``PRELUDE``.
        code: exit statuses of the launcher that are right.
        words: a pattern that the output must show.
        ranks: number of processes.
        environ: further variables.
        launcher: see ``launch``.
    """

    what: str
    body: str
    code: tuple[int, ...]
    words: str
    ranks: int = 2
    environ: Mapping[str, str] = field(default_factory=lambda: NEVER)
    launcher: str = "mpirun"


RAISED = r"gossip_hvd: rank 1 raised; the job ends\.\nTraceback(.|\n)*LookupError: the data of rank"
STALLED = r"StallError: no progress for \d+ s on host \S+: rank \d \(node \d\)"
GONE = r"Rank 1 on host \S+ has left: its program ended, or called sys.exit or shutdown"
SILENT = r"Rank [13] does not answer: it is stopped, or its host or link is gone"
INTERRUPTED = r"gossip_hvd: rank 1 raised; the job ends\.\nTraceback(.|\n)*KeyboardInterrupt"


def differs(what: str) -> str:
    return rf"ConfigError: .*rank 1 and rank 0 differ in {what}"


FAULTS: tuple[Fault, ...] = (
    Fault("exception in forward", "train(4000, 20, refuse, where='forward')", (1,), RAISED),
    Fault(
        "exception in a worker of the DataLoader",
        "train(1500, 20, refuse, where='loader', workers=1)",
        (1,),
        r"rank 1 raised; the job ends(.|\n)*LookupError: Caught LookupError in DataLoader worker",
    ),
    Fault("exception in a callback", "train(4000, 20, refuse, where='callback')", (1,), RAISED),
    Fault(
        "exception in a Keras callback",
        "import keras, numpy\n"
        "import gossip_hvd.keras as hvd\n"
        "class Bad(keras.callbacks.Callback):\n"
        "    def on_train_batch_end(self, batch, logs=None):\n"
        "        if batch == 20 and hvd.rank() == 1:\n"
        "            refuse()\n"
        "hvd.init(node_size=1)\n"
        "model = keras.Sequential([keras.layers.Dense(1)])\n"
        "model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), 'mse')\n"
        "x = numpy.ones((8000, 3), 'float32')\n"
        "model.fit(x, x[:, :1], batch_size=4, verbose=0, callbacks=[Bad()])",
        (1,),
        RAISED,
        environ=NEVER | {"KERAS_BACKEND": "torch"},
    ),
    Fault(
        "a rank that stops in Keras's fit, its node's others in a graph",
        "import keras, numpy\n"
        "import gossip_hvd.keras as hvd\n"
        "class Slow(keras.callbacks.Callback):\n"
        "    def on_train_batch_begin(self, batch, logs=None):\n"
        "        if hvd.rank() == 1 and batch == 20:\n"
        "            say()\n"
        "            time.sleep(80)\n"
        "hvd.init(node_size=2)\n"
        "model = keras.Sequential([keras.layers.Dense(1)])\n"
        "model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), 'mse')\n"
        "x = numpy.ones((4000, 3), 'float32')\n"
        "model.fit(x, x[:, :1], batch_size=4, verbose=0, callbacks=[Slow()])",
        (1, 75),
        r"rank 0 raised; the job ends(.|\n)*([Ss]tall|shut down)",
        environ=SOON | {"KERAS_BACKEND": "tensorflow"},
    ),
    Fault("SIGKILL of a rank", "train(4000, 20, lambda: kill(9))", (137,), r"signal 9 \(Killed\)"),
    Fault(
        "SIGKILL of a host",
        f"train(4000, 20, lambda: kill(9), ranks=(2, 3), {TWO_NODES})",
        (137,),
        r"signal 9 \(Killed\)",
        ranks=4,
    ),
    Fault(
        "SIGSTOP of a rank",
        "train(4000, 20, lambda: kill(signal.SIGSTOP))",
        (75,),
        rf"{STALLED}(.|\n)*{SILENT}",
        environ=SOON,
    ),
    Fault(
        "SIGSTOP of a host",
        f"train(4000, 20, lambda: kill(signal.SIGSTOP), ranks=(2, 3), {TWO_NODES})",
        (75,),
        rf"{STALLED}(.|\n)*does not answer",
        ranks=4,
        environ=SOON,
    ),
    Fault(
        "SIGSTOP of a rank, SIGCONT after 4 s",
        "def pause():\n"
        "    say()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(4)\n"
        "        os.kill(os.getppid(), signal.SIGCONT)\n"
        "        os._exit(0)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "train(100, 20, pause)",
        (0,),
        r"no progress for \d+ s on host \S+: rank 0 .node 0., round 20",
        environ=SOON | {"GOSSIP_HVD_STALL_TIMEOUT": "60"},
    ),
    Fault(
        "SIGTERM of a rank",
        "train(4000, 20, lambda: kill(signal.SIGTERM))",
        (143,),
        r"signal 15 \(Terminated\)",
    ),
    Fault(
        "SIGTERM of one rank of a job that saves when it is told to end",
        "hvd.init(node_size=2)\n"
        "def save():\n"
        "    step = hvd.allgather(torch.tensor([session.current().watch.terminator.step]))\n"
        "    print('saved after', step.tolist(), flush=True)\n"
        "from gossip_hvd import session\n"
        "hvd.on_terminate(save)\n"
        f"train(4000, 20, lambda: kill(signal.SIGTERM), {TWO_NODES})",
        (143,),
        r"(?s)(saved after \[(\d+), \2, \2, \2\].*){4}",
        ranks=4,
    ),
    Fault(
        "SIGTERM of the launcher, which leaves its ranks time, all save",
        "def save():\n"
        "    step = hvd.allgather(torch.tensor([session.current().watch.terminator.step]))\n"
        "    print('saved after', step.tolist(), flush=True)\n"
        "from gossip_hvd import session\n"
        "hvd.init(node_size=2)\n"
        "hvd.on_terminate(save)\n"
        "train(4000, 20, lambda: (say(), os.kill(os.getppid(), signal.SIGTERM)), node_size=2)",
        (143, 1),
        r"(?s)(saved after \[(\d+), \2, \2, \2\].*){4}",
        ranks=4,
        environ=NEVER | {"OMPI_MCA_odls_base_sigkill_timeout": "8"},
    ),
    Fault(
        "a NaN in the last exchange, which only the end of the program merges",
        "hvd.init(node_size=1)\n"
        "model = torch.nn.Linear(3, 2)\n"
        "if hvd.rank() == 1:\n"
        "    torch.nn.init.constant_(model.weight, float('nan'))\n"
        "optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),\n"
        "                                     model.named_parameters(), timing='awc')\n"
        "model(torch.ones(4, 3)).sum().backward()\n"
        "optimizer.step()\n"
        "say()",
        (1,),
        r"raised; the job ends(.|\n)*NotFiniteError",
    ),
    Fault(
        "SIGTERM of one rank, all save under Keras's fit",
        "import keras, numpy\n"
        "import gossip_hvd.keras as hvd\n"
        "class Term(keras.callbacks.Callback):\n"
        "    def on_train_batch_begin(self, batch, logs=None):\n"
        "        if hvd.rank() == 1 and batch == 20:\n"
        "            kill(signal.SIGTERM)\n"
        "class Checkpoint(hvd.callbacks.GossipCheckpoint):\n"
        "    def save(self, epoch):\n"
        "        super().save(epoch)\n"
        "        step = int(self.model.optimizer.iterations.numpy())\n"
        "        print('saved after', hvd.allgather_object(step), flush=True)\n"
        "hvd.init(node_size=2)\n"
        "model = keras.Sequential([keras.layers.Dense(1)])\n"
        "model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), 'mse')\n"
        "x = numpy.ones((20000, 3), 'float32')\n"
        "model.fit(x, x[:, :1], batch_size=4, verbose=0,\n"
        "          callbacks=[Term(), Checkpoint(os.environ['SAVED'], on_terminate=True)])",
        (143,),
        r"(?s)(saved after \[(\d+), \2, \2, \2\].*){4}",
        ranks=4,
        environ=NEVER | {"KERAS_BACKEND": "tensorflow", "SAVED": "{folder}/saved"},
    ),
    Fault(
        "SIGTERM of a rank that keeps records, deep in a wait",
        "train(4000, 20, lambda: (later(1, kill, signal.SIGTERM), time.sleep(30)), ranks=(0,))",
        (143,),
        r"signal 15 \(Terminated\)|non-zero status",
        environ=NEVER | {"GOSSIP_HVD_RECORD_DIR": "{folder}/records"},
    ),
    Fault(
        "SIGTERM of the launcher, as a batch system sends it",
        "train(4000, 20, lambda: (say(), os.kill(os.getppid(), signal.SIGTERM)))",
        (143, 1),
        r"",
    ),
    Fault(
        "keyboard interrupt of the launcher",
        "train(4000, 20, lambda: (say(), os.kill(os.getppid(), signal.SIGINT)))",
        (130, 1),
        r"",
    ),
    Fault("interrupt in forward", "train(4000, 20, interrupt, where='forward')", (1,), INTERRUPTED),
    Fault(
        "interrupt in backward", "train(4000, 20, interrupt, where='backward')", (1,), INTERRUPTED
    ),
    Fault("interrupt between steps", "train(4000, 20, interrupt)", (1,), INTERRUPTED),
    Fault(
        "interrupt of a rank that waits",
        "train(4000, 20, lambda: (say(), hvd.rank() == 1 and later(1, os.kill, os.getpid(), "
        "signal.SIGINT), hvd.rank() == 0 and time.sleep(60)), ranks=(0, 1))",
        (1,),
        INTERRUPTED,
    ),
    Fault(
        "interrupt in shutdown",
        "train(20)\n"
        "if hvd.rank() == 1:\n"
        "    say()\n"
        "    later(1, os.kill, os.getpid(), signal.SIGINT)\n"
        "    hvd.shutdown()\n"
        "time.sleep(30)",
        (1,),
        INTERRUPTED,
    ),
    Fault(
        "out of memory in a buffer",
        "import resource\n"
        "hvd.init(node_size=1)\n"
        "model = torch.nn.Linear(4096, 4096)\n"
        "if hvd.rank() == 1:\n"
        "    say()\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20),) * 2)\n"
        "hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),\n"
        "                         model.named_parameters())\n"
        "time.sleep(30)",
        (1,),
        r"rank 1 raised; the job ends(.|\n)*([Nn]ot enough memory|MemoryError|can't allocate)",
    ),
    Fault(
        "no place for records",
        "train(4000, 20, refuse)",
        (1,),
        rf"{RAISED}(.|\n)*cannot write its record",
        environ=NEVER | {"GOSSIP_HVD_RECORD_DIR": "/dev/full/records"},
    ),
    Fault(
        "another model",
        "hvd.init(node_size=1)\nsay()\nwidth = 2 + hvd.rank()\ntrain(9, width=width)",
        (1,),
        differs("parameter 'weight'"),
    ),
    Fault(
        "another seed",
        "hvd.init(node_size=1)\nsay()\ntrain(9, options=[('seed', hvd.rank())])",
        (1,),
        differs("engine options"),
    ),
    Fault(
        "another method",
        "hvd.init(node_size=1)\nsay()\ntrain(9, method='gossip' if hvd.rank() else 'crossover')",
        (1,),
        differs("method"),
    ),
    Fault(
        "another version of gossip_hvd",
        "import gossip_hvd.session\nsay()\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    gossip_hvd.session.__version__ = '9'\n"
        "train(9)",
        (1,),
        differs("the version of gossip_hvd"),
    ),
    Fault(
        "hosts with different TensorFlow, under Keras",
        "import keras, numpy\n"
        "import gossip_hvd.keras as hvd\n"
        "from gossip_hvd.tensorflow.framework import TensorFlow\n"
        "hvd.init(node_size=1)\n"
        "if hvd.rank() == 1:\n"
        "    TensorFlow.version = '2.0.0'\n"
        "say()\n"
        "hvd.DistributedOptimizer(keras.optimizers.SGD(0.01))",
        (1,),
        differs("the version of tensorflow"),
        environ=NEVER | {"KERAS_BACKEND": "tensorflow"},
    ),
    Fault(
        "hosts with different packages",
        "say()\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    torch.__version__ = '1.0'\n"
        "train(9)",
        (1,),
        differs("the version of torch"),
    ),
    Fault(
        "another environment",
        "say()\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    os.environ['GOSSIP_HVD_SEED'] = '4'\n"
        "train(9)",
        (1,),
        differs("GOSSIP_HVD_SEED"),
    ),
    Fault(
        "an environment variable that does not exist",
        "say()\ntrain(9)",
        (1,),
        r"unknown environment variable 'GOSSIP_HVD_SEEED'.*did you mean 'GOSSIP_HVD_SEED'",
        environ={"GOSSIP_HVD_SEEED": "1"},
    ),
    Fault(
        "less data",
        "hvd.init(node_size=1)\nsay()\ntrain(20 + 4000 * (1 - hvd.rank()))",
        (1, 75),
        r"PlanError: rank \d is in round \d+ \(m\w+\), and rank \d in round \d+ of another kind",
        environ=SOON,
    ),
    Fault(
        "a rank that skips a step",
        f"train(60, 20, say, ranks=(1,), where='skip', {TWO_NODES})",
        (1, 75),
        r"PlanError: rank \d is in round \d+ \(m\w+\), and rank \d in round \d+ of another kind",
        ranks=4,
        environ=SOON,
    ),
    Fault(
        "a rank that calls an extra collective",
        "train(4000, 20, lambda: (say(), hvd.allreduce(torch.ones(2), name='extra')))",
        (1, 75),
        r"allreduce 'torch.extra' has waited \d s for ranks \[0\]",
        environ=SOON,
    ),
    Fault(
        "a rank that leaves by sys.exit(3)",
        "train(4000, 20, lambda: (say(), sys.exit(3)))",
        (75,),
        GONE,
    ),
    Fault(
        "a rank that ends early with code 0",
        "train(4000, 20, lambda: (say(), sys.exit(0)))",
        (75,),
        GONE,
    ),
    Fault(
        "a rank that ends early by os._exit(0)",
        "train(4000, 20, lambda: (say(), os._exit(0)))",
        (1,),
        r"exiting improperly|without calling \"finalize\"|non-zero",
    ),
    Fault(
        "a NaN in one node's weights",
        "train(4000, 20, say, where='nan')",
        (1,),
        r"NotFiniteError: rank \d \(node \d\), round 20, segment 'weight': values of node 1 ",
    ),
    Fault(
        "a rank that computes for too long",
        "train(4000, 20, lambda: (say(), time.sleep(60)))",
        (75,),
        rf"{STALLED}, round 20(.|\n)*Rank 1 on host \S+ waits for nobody: it is at <string>:\d+ in",
        environ=SOON,
    ),
    Fault(
        "a rank in a debugger for 15 s",
        "import pdb\n"
        "class Slow:\n"
        "    def readline(self):\n"
        "        time.sleep(15)\n"
        "        return 'continue\\n'\n"
        "def stop():\n"
        "    say()\n"
        "    pdb.Pdb(stdin=Slow(), stdout=sys.stderr, nosigint=True).set_trace()\n"
        "train(100, 20, stop)",
        (0,),
        r"(?s)(trained.*){2}",
        environ=SOON,
    ),
    Fault(
        "a rank in a debugger for 25 s, which others wait for who wait for it (limit 8 s)",
        "import pdb\n"
        "class Slow:\n"
        "    def readline(self):\n"
        "        time.sleep(25)\n"
        "        return 'continue\\n'\n"
        "def stop():\n"
        "    say()\n"
        "    pdb.Pdb(stdin=Slow(), stdout=sys.stderr, nosigint=True).set_trace()\n"
        "train(60, 20, stop, options={'topology': 'ring'})",
        (0,),
        r"(?s)(trained.*){5}",
        ranks=5,
        environ={"GOSSIP_HVD_STALL_TIMEOUT": "8", "GOSSIP_HVD_STALL_WARNING": "4"},
    ),
    Fault(
        "ranks started without MPI",
        "say()\ntrain(9)",
        (1,),
        r"HOROVOD_SIZE=2, and MPI knows one rank.*Start them with horovodrun --mpi or mpirun",
        ranks=1,
        environ={"HOROVOD_SIZE": "2"},
        launcher="python",
    ),
)


@dataclass(frozen=True)
class Seen:
    """How a launch went.

    Attributes:
        outcome: of the launch.
        after: seconds from the trouble to the end.
        files: what was left behind, of shared memory and drafts.
        records: ranks that left a record.
    """

    outcome: Outcome
    after: float
    files: tuple[str, ...]
    records: tuple[str, ...]


def run(fault: Fault) -> Seen:
    """Launch it, with all of MPI's files in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder, shared = Path(name), Path(tempfile.mkdtemp(dir="/dev/shm"))
        places = {
            "OMPI_MCA_btl_vader_backing_directory": str(shared),
            "GOSSIP_HVD_RECORD_DIR": "{folder}/records",
        }
        environ = {k: v.format(folder=folder) for k, v in {**places, **fault.environ}.items()}
        try:
            outcome = launch(
                PRELUDE + fault.body,
                fault.ranks,
                launcher=fault.launcher,
                limit=LIMIT,
                environ=environ,
            )
            ended = time.time()
            left = [p.name for p in shared.iterdir()]
        finally:
            shutil.rmtree(shared, ignore_errors=True)
        began = re.findall(r"trouble at ([0-9.]+)", outcome.out)
        after = ended - float(min(began)) if began else float("nan")
        drafts = [str(p) for p in folder.rglob("*.tmp")]
        records = sorted(p.name for p in folder.rglob("rank*.jsonl"))
        return Seen(outcome, after, (*left, *drafts), tuple(records))


def run_all(faults: Sequence[Fault]) -> Iterator[tuple[Fault, Seen]]:
    """Run several at once; in their order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from zip(faults, pool.map(run, faults), strict=True)


def main(words: Sequence[str]) -> None:
    """Print the table."""
    chosen = [f for f in FAULTS if not words or any(word in f.what for word in words)]
    print("| fault | seconds | exit code | what is said |\n|---|--:|--:|---|")
    for fault, seen in run_all(chosen):
        found = re.search(fault.words, seen.outcome.text)
        said = " ".join(found[0].split())[-160:] if found else "NOT SAID"
        wrong = "" if seen.outcome.code in fault.code and not seen.outcome.left else " WRONG"
        print(
            f"| {fault.what} | {seen.after:.1f} | {seen.outcome.code}{wrong} | {said} |", flush=True
        )
        if not found or wrong or seen.files:
            print(seen.files, seen.outcome.left, seen.outcome.text[-3000:], file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
