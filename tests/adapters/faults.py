"""Every fault on real ranks: what goes wrong where, how the job must end, and what is said.

python tests/adapters/faults.py [WORDS]     the table of docs/guarantees.md, as seen here
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fault import (
    GONE,
    NEVER,
    RAISED,
    SILENT,
    SOON,
    STALLED,
    TWO_NODES,
    Fault,
    differs,
    interrupted,
    killed,
    run_all,
    terminated,
)
from faults_checkpoint import CHECKPOINT
from faults_nan import NAN
from faults_signals import SIGNALS

AWC = "options={'timing': 'awc'}"

UNSAID = r"^trouble at [0-9.]+\s*$"
"""Where the launcher itself is told to end, neither it nor a rank says why."""

FAULTS: tuple[Fault, ...] = (
    Fault("exception in forward", "train(4000, 20, refuse, where='forward')", 1, RAISED),
    Fault(
        "exception in a worker of the DataLoader",
        "train(1500, 20, refuse, where='loader', workers=1)",
        1,
        r"rank 1 raised; the job ends(.|\n)*LookupError: Caught LookupError in DataLoader worker",
    ),
    Fault("exception in a callback", "train(4000, 20, refuse, where='callback')", 1, RAISED),
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
        1,
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
        1,
        r"rank 0 raised; the job ends(.|\n)*Horovod has been shut down",
        environ=SOON | {"KERAS_BACKEND": "tensorflow"},
    ),
    Fault("SIGKILL of a rank", "train(4000, 20, lambda: kill(9))", 137, killed("1")),
    Fault(
        "SIGKILL of a host",
        f"train(4000, 20, lambda: kill(9), ranks=(2, 3), {TWO_NODES})",
        137,
        killed("23"),
        ranks=4,
    ),
    Fault(
        "SIGKILL of a rank with a worker of the DataLoader",
        "train(1500, 20, lambda: kill(9), where='worker', workers=1)",
        137,
        killed("1"),
        patience=15.0,  # PyTorch's workers look for their parent every 5 s
    ),
    Fault(
        "SIGSTOP of a rank",
        "train(4000, 20, lambda: kill(signal.SIGSTOP))",
        75,
        rf"{STALLED}(.|\n)*{SILENT}",
        environ=SOON,
    ),
    Fault(
        "SIGSTOP of a host",
        f"train(4000, 20, lambda: kill(signal.SIGSTOP), ranks=(2, 3), {TWO_NODES})",
        75,
        rf"{STALLED}(.|\n)*{SILENT}",
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
        0,
        r"no progress for \d+ s on host \S+: rank 0 .node 0., round 20",
        environ=SOON | {"GOSSIP_HVD_STALL_TIMEOUT": "60"},
    ),
    Fault(
        "SIGTERM of a rank",
        "train(4000, 20, lambda: kill(signal.SIGTERM))",
        143,
        terminated("1"),
    ),
    Fault(
        "SIGTERM of one rank of a job that saves when it is told to end",
        "hvd.init(node_size=2)\n"
        "def save():\n"
        "    step = hvd.allgather(torch.tensor([session.current().watch.terminator.step]))\n"
        "    tell('saved after', step.tolist())\n"
        "from gossip_hvd import session\n"
        "hvd.on_terminate(save)\n"
        f"train(4000, 20, lambda: kill(signal.SIGTERM), {TWO_NODES})",
        143,
        r"(?s)(saved after \[(\d+), \2, \2, \2\].*){4}",
        ranks=4,
    ),
    Fault(
        "SIGTERM of the launcher, which leaves its ranks time, all save",
        "def save():\n"
        "    step = hvd.allgather(torch.tensor([session.current().watch.terminator.step]))\n"
        "    tell('saved after', step.tolist())\n"
        "from gossip_hvd import session\n"
        "hvd.init(node_size=2)\n"
        "hvd.on_terminate(save)\n"
        "train(4000, 20, lambda: (say(), os.kill(os.getppid(), signal.SIGTERM)), node_size=2)",
        1,
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
        1,
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
        "        tell('saved after', hvd.allgather_object(step))\n"
        "hvd.init(node_size=2)\n"
        "model = keras.Sequential([keras.layers.Dense(1)])\n"
        "model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), 'mse')\n"
        "x = numpy.ones((20000, 3), 'float32')\n"
        "model.fit(x, x[:, :1], batch_size=4, verbose=0,\n"
        "          callbacks=[Term(), Checkpoint(os.environ['SAVED'], on_terminate=True)])",
        143,
        r"(?s)(saved after \[(\d+), \2, \2, \2\].*){4}",
        ranks=4,
        environ=NEVER | {"KERAS_BACKEND": "tensorflow", "SAVED": "{folder}/saved"},
    ),
    Fault(
        "SIGTERM of a rank that keeps records, deep in a wait",
        "train(4000, 20, lambda: (later(1, kill, signal.SIGTERM), time.sleep(60)), ranks=(0,))",
        143,
        terminated("0"),
        environ=NEVER | {"GOSSIP_HVD_RECORD_DIR": "{folder}/records"},
    ),
    Fault(
        "SIGTERM of the launcher, as a batch system sends it",
        "train(4000, 20, lambda: (say(), os.kill(os.getppid(), signal.SIGTERM)))",
        1,
        UNSAID,
    ),
    Fault(
        "keyboard interrupt of the launcher",
        "train(4000, 20, lambda: (say(), os.kill(os.getppid(), signal.SIGINT)))",
        1,
        UNSAID,
    ),
    Fault("interrupt in forward", "train(4000, 20, interrupt, where='forward')", 1, interrupted(1)),
    Fault(
        "interrupt in backward", "train(4000, 20, interrupt, where='backward')", 1, interrupted(1)
    ),
    Fault("interrupt between steps", "train(4000, 20, interrupt)", 1, interrupted(1)),
    Fault(
        "interrupt of a rank that waits",
        "train(4000, 20, lambda: (say(), hvd.rank() == 1 and later(1, os.kill, os.getpid(), "
        "signal.SIGINT), hvd.rank() == 0 and time.sleep(60)), ranks=(0, 1))",
        1,
        interrupted(1, "drive"),
    ),
    Fault(
        "interrupt in shutdown",
        "train(20)\n"
        "if hvd.rank() == 1:\n"
        "    say()\n"
        "    later(1, os.kill, os.getpid(), signal.SIGINT)\n"
        "    hvd.shutdown()\n"
        "time.sleep(60)",
        1,
        interrupted(1, "shutdown"),
    ),
    Fault(
        "out of memory in a buffer",
        "import resource\n"
        "hvd.init(node_size=1)\n"
        "def distributed(model):\n"
        "    sgd = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "    hvd.DistributedOptimizer(sgd, model.named_parameters())\n"
        "distributed(torch.nn.Linear(4, 4))\n"  # whatever else it needs is there
        "model = torch.nn.Linear(4096, 4096)\n"
        "if hvd.rank() == 1:\n"
        "    say()\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20),) * 2)\n"
        "distributed(model)\n"
        "time.sleep(60)",
        1,
        r"rank 1 raised; the job ends(.|\n)*in distributed\n(.|\n)*([Nn]ot enough memory|"
        r"MemoryError|can't allocate)",
    ),
    Fault(
        "no place for records",
        "train(4000, 20, refuse)",
        1,
        rf"{RAISED}(.|\n)*cannot write its record",
        environ=NEVER | {"GOSSIP_HVD_RECORD_DIR": "/dev/full/records"},
    ),
    Fault(
        "another model",
        "hvd.init(node_size=1)\nsay()\nwidth = 2 + hvd.rank()\ntrain(9, width=width)",
        1,
        differs("parameter 'weight'"),
    ),
    Fault(
        "another seed",
        "hvd.init(node_size=1)\nsay()\ntrain(9, options=[('seed', hvd.rank())])",
        1,
        differs("engine options"),
    ),
    Fault(
        "another method",
        "hvd.init(node_size=1)\nsay()\ntrain(9, method='gossip' if hvd.rank() else 'crossover')",
        1,
        differs("method"),
    ),
    Fault(
        "another version of gossip_hvd",
        "import gossip_hvd.session\nsay()\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    gossip_hvd.session.__version__ = '9'\n"
        "train(9)",
        1,
        differs("the version of gossip_hvd"),
    ),
    Fault(
        "hosts with different TensorFlow, under Keras",
        "import tensorflow\n"
        "import gossip_hvd.keras as hvd\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    tensorflow.__version__ = '2.0.0'\n"
        "say()\n"
        "hvd.init(node_size=1)",
        1,
        differs("the version of tensorflow"),
        environ=NEVER | {"KERAS_BACKEND": "tensorflow"},
    ),
    Fault(
        "hosts with different packages",
        "say()\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    torch.__version__ = '1.0'\n"
        "train(9)",
        1,
        differs("the version of torch"),
    ),
    Fault(
        "another environment",
        "say()\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    os.environ['GOSSIP_HVD_SEED'] = '4'\n"
        "train(9)",
        1,
        differs("GOSSIP_HVD_SEED"),
    ),
    Fault(
        "an environment variable that does not exist",
        "say()\ntrain(9)",
        1,
        r"unknown environment variable 'GOSSIP_HVD_SEEED'.*did you mean 'GOSSIP_HVD_SEED'",
        environ={"GOSSIP_HVD_SEEED": "1"},
    ),
    Fault(
        "less data",
        "hvd.init(node_size=1)\nsay()\ntrain(20 + 4000 * (1 - hvd.rank()))",
        1,
        r"PlanError: rank \d is in round \d+ \(m\w+\), and rank \d in round \d+ of another kind",
        environ=SOON,
    ),
    Fault(
        "a rank that skips a step",
        f"train(60, 20, say, ranks=(1,), where='skip', {TWO_NODES})",
        1,
        r"PlanError: rank \d is in round \d+ \(m\w+\), and rank \d in round \d+ of another kind",
        ranks=4,
        environ=SOON,
    ),
    Fault(
        "a rank that calls an extra collective",
        "train(4000, 20, lambda: (say(), hvd.allreduce(torch.ones(2), name='extra')))",
        1,
        r"allreduce 'torch.extra' has waited \d s for ranks \[0\]",
        environ=SOON,
    ),
    Fault(
        "a rank that leaves by sys.exit(3)",
        "train(4000, 20, lambda: (say(), sys.exit(3)))",
        75,
        GONE,
    ),
    Fault(
        "a rank that ends early with code 0",
        "train(4000, 20, lambda: (say(), sys.exit(0)))",
        75,
        GONE,
    ),
    Fault(
        "a rank that ends early by os._exit(0)",
        "train(4000, 20, lambda: (say(), os._exit(0)))",
        1,
        r"process rank 1 with PID \d+ on\s+node \S+ exiting improperly",
    ),
    Fault(
        "a NaN in one node's weights",
        "train(4000, 20, say, where='nan')",
        1,
        r"NotFiniteError: rank \d \(node \d\), round 20, segment 'weight': values of node 1 ",
    ),
    Fault(
        "a rank that computes for too long",
        "train(4000, 20, lambda: (say(), time.sleep(60)))",
        75,
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
        0,
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
        0,
        r"(?s)(trained.*){5}",
        ranks=5,
        environ={"GOSSIP_HVD_STALL_TIMEOUT": "8", "GOSSIP_HVD_STALL_WARNING": "4"},
    ),
    Fault(
        "ranks started without MPI",
        "say()\ntrain(9)",
        1,
        r"HOROVOD_SIZE=2, and MPI knows one rank.*Start them with horovodrun --mpi or mpirun",
        ranks=1,
        environ={"HOROVOD_SIZE": "2"},
        launcher="python",
    ),
    Fault(
        "ranks started by torchrun",
        "say()\ntrain(9)",
        1,
        r"WORLD_SIZE=2, and MPI knows one rank: ranks were started by torchrun,.*"
        r"Start them with horovodrun --mpi or mpirun",
        # torchrun leaves its log, and kills the slower rank, whose MPI leaves its folder.
        environ=NEVER
        | {"PET_LOG_DIR": "{folder}/log", "OMPI_MCA_orte_tmpdir_base": "{folder}/mpi"},
        launcher="torchrun",
    ),
    Fault(
        "ranks started by horovodrun --gloo",
        "say()\ntrain(9)",
        1,
        # Horovod is built without Gloo by tools/, and then says so before any rank starts.
        r"Gloo support has not been built|HOROVOD_SIZE=2, and MPI knows one rank",
        launcher="horovodrun --gloo",
    ),
    Fault(
        "exception in forward, under AWC",
        f"train(4000, 20, refuse, where='forward', {AWC})",
        1,
        RAISED,
    ),
    Fault(
        "SIGKILL of a rank, under AWC", f"train(4000, 20, lambda: kill(9), {AWC})", 137, killed("1")
    ),
    Fault(
        "SIGSTOP of a rank, under AWC",
        f"train(4000, 20, lambda: kill(signal.SIGSTOP), {AWC})",
        75,
        rf"{STALLED}(.|\n)*{SILENT}",
        environ=SOON,
    ),
    Fault(
        "a rank that leaves early, under AWC",
        f"train(4000, 20, lambda: (say(), sys.exit(0)), {AWC})",
        75,
        GONE,
    ),
)

ALL = (*FAULTS, *SIGNALS, *CHECKPOINT, *NAN)


def main(words: Sequence[str]) -> None:
    """Print the table."""
    chosen = [f for f in ALL if not words or any(word in f.what for word in words)]
    print("| fault | seconds | exit code | what is said |\n|---|--:|--:|---|")
    for fault, seen in run_all(chosen):
        found = re.search(fault.words, seen.outcome.text)
        said = " ".join(found[0].split())[-160:] if found else "NOT SAID"
        after = "–" if seen.after != seen.after else f"{seen.after:.1f}"
        print(f"| {fault.what} | {after} | {seen.outcome.code} | {said} |", flush=True)
        if wrong := seen.wrong(fault):
            print("WRONG:", *wrong, seen.outcome.text[-3000:], sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
