"""Signals to whole hosts, and interrupts of one rank wherever it may stand."""

from __future__ import annotations

from fault import NEVER, SOON, TWO_NODES, Fault, interrupted, terminated
from faults_checkpoint import saving

PAUSE = """
def pause():
    say()
    if os.fork() == 0:
        time.sleep(4)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
"""

KERAS = """
import keras, numpy
import gossip_hvd.keras as hvd

def fit(at_batch):
    class Trouble(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 20:
                at_batch()
    hvd.init(node_size=1)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    x = numpy.ones((8000, 3), "float32")
    model.fit(x, x[:, :1], batch_size=4, verbose=0, callbacks=[Trouble()])
"""

INTERRUPT = "os.kill, os.getpid(), signal.SIGINT"

STARTING = f"""
from gossip_hvd import session
from gossip_hvd.transport import mpi

def at(owner, name, seconds):
    # Rank 0 comes there so much later; rank 1 is interrupted 2 s after it has come.
    real = getattr(owner, name)
    def call(*arguments):
        if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
            time.sleep(seconds)
        else:
            say()
            later(2, {INTERRUPT})
        return real(*arguments)
    setattr(owner, name, call)
"""

SIGNALS: tuple[Fault, ...] = (
    Fault(
        "SIGTERM of a host",
        f"train(4000, 20, lambda: kill(signal.SIGTERM), ranks=(2, 3), {TWO_NODES})",
        143,
        terminated("23"),
        ranks=4,
    ),
    saving(
        Fault(
            "SIGTERM of a host of a job that saves when it is told to end",
            "def leave():\n"
            "    step = hvd.allgather(torch.tensor([session.current().watch.terminator.step]))\n"
            "    tell('saves after', step.tolist())\n"
            "    save(3)\n"
            "from gossip_hvd import session\n"
            "hvd.on_terminate(leave)\n"
            f"train(4000, 20, lambda: kill(signal.SIGTERM), ranks=(2, 3), {TWO_NODES})",
            143,
            r"(?s)(saves after \[(\d+), \2, \2, \2\].*){4}",
            ranks=4,
        ),
        restored=3,
        build=TWO_NODES,
    ),
    Fault(
        "SIGSTOP of a host, SIGCONT after 4 s",
        f"{PAUSE}train(100, 20, pause, ranks=(2, 3), {TWO_NODES})",
        0,
        r"(?s)(trained.*){4}no progress for \d+ s on host \S+: rank [01] .node 0., round 20",
        ranks=4,
        environ=SOON | {"GOSSIP_HVD_STALL_TIMEOUT": "60"},
    ),
    Fault(
        "interrupt of a rank that is in the midst of an exchange, under AWC",
        "from gossip_hvd.transport.mpi import MpiWire\n"
        "send, sent = MpiWire.send, []\n"
        "def stop(wire, peer, tag, data):\n"
        "    sent.append(data.nbytes)\n"
        "    if sum(sent) > 600_000:\n"
        "        time.sleep(60)\n"
        "    return send(wire, peer, tag, data)\n"
        "def begin():\n"
        "    say()\n"
        "    if hvd.rank() == 0:\n"
        "        MpiWire.send = stop\n"
        "    else:\n"
        f"        later(2, {INTERRUPT})\n"
        "train(4000, 20, begin, ranks=(0, 1), width=100_000,\n"
        "      options={'timing': 'awc', 'chunk_bytes': 1 << 16})",
        1,
        interrupted(1, "drive"),
    ),
    Fault(
        "interrupt of a rank in init",
        f"{STARTING}at(session, 'require_agreement', 60)\ntrain(9)",
        1,
        interrupted(1, "require_agreement"),
    ),
    Fault(
        "interrupt of a rank while MPI starts, which another does 6 s later and then sleeps",
        f"{STARTING}at(mpi, 'start', 6)\nat(session, 'require_agreement', 60)\ntrain(9)",
        1,
        interrupted(1),
    ),
    Fault(
        "interrupt of a rank that starts Horovod with one that does not",
        f"{STARTING}at(session, '_start_horovod', 60)\ntrain(9, {TWO_NODES})",
        1,
        r"gossip_hvd: rank 1 was interrupted; the job ends\. rank 1 \(node 0\) waits for "
        r"ranks \[0\] to start Horovod, and cannot break off\.",
    ),
    Fault(
        "interrupt of a rank in Keras's fit",
        f"{KERAS}fit(lambda: hvd.rank() == 1 and (say(), {INTERRUPT.replace(',', '(', 1)})))",
        1,
        interrupted(1),
        environ=NEVER | {"KERAS_BACKEND": "tensorflow"},
    ),
    Fault(
        "interrupt of a rank that waits for another in Keras's fit",
        f"{KERAS}"
        "def at_batch():\n"
        "    say()\n"
        "    if hvd.rank() == 0:\n"
        "        time.sleep(60)\n"
        f"    later(1, {INTERRUPT})\n"
        "fit(at_batch)",
        1,
        r"gossip_hvd: rank 1 was interrupted; the job ends\. rank 1 \(node 1\), round 20, .*"
        r"waits for .*, and cannot break off\.",
        environ=NEVER | {"KERAS_BACKEND": "tensorflow"},
    ),
    Fault(
        "interrupt of a rank at the end of its program",
        f"train(20)\nif hvd.rank() == 0:\n    time.sleep(60)\nsay()\nlater(1, {INTERRUPT})",
        1,
        interrupted(1, "_shutdown_at_exit"),
    ),
)
