"""Faults while a checkpoint is written: no torn one is ever restored, the newest whole one is."""

from __future__ import annotations

from dataclasses import replace

from fault import Fault, interrupted, killed

SAVING = """
import ctypes, resource
from gossip_hvd.checkpoint import folder, job

def directory(own_disks=False):
    return os.path.join(os.environ["FOLDER"], f"disk{hvd.node()}" if own_disks else "disk")

def build(own_disks=False, **init):
    hvd.init(**{"node_size": 1, **init})
    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(30, 20)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         model.named_parameters())
    parts = {"model": model, "optimizer": optimizer}

    def save(number, ballast=0, **options):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(number + hvd.node())
        extra = [number, hvd.rank(), torch.zeros(ballast)]
        hvd.save_checkpoint(directory(own_disks), extra=extra, **parts, **options)

    def restore():
        number, rank, _ = hvd.restore(directory(own_disks), **parts).extra
        assert rank == hvd.rank()
        assert all(bool((p == number + hvd.node()).all()) for p in model.parameters())
        tell("restored", number)

    return save, restore

def before(owner, name, trouble, rank=1):
    real = getattr(owner, name)
    def call(*arguments):
        trouble()
        return real(*arguments)
    if hvd.rank() == rank:
        setattr(owner, name, call)

def shrink(path):
    # A disk of 64 KB that nobody else sees and that goes with its process; where the system
    # permits none, a limit to the size of files.
    libc, os_path = ctypes.CDLL(None), path.encode()
    os.makedirs(path)
    new_mounts, private, everywhere = 0x20000, 1 << 18, 1 << 14
    if (
        libc.unshare(new_mounts)
        or libc.mount(None, b"/", None, private | everywhere, None)
        or libc.mount(b"tmpfs", os_path, b"tmpfs", 0, b"size=64k")
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
"""


def saving(fault: Fault, restored: int, build: str = "") -> Fault:
    """The fault behind ``SAVING``; afterwards all ranks restore that checkpoint and save again."""
    ranks = fault.ranks
    return replace(
        fault,
        body=f"{SAVING}save, restore = build({build})\n{fault.body}",
        then=f"{SAVING}save, restore = build({build})\nrestore()\nsave(9)\nrestore()",
        then_words=rf"(?s)(restored {restored}\s.*){{{ranks}}}(restored 9\s.*){{{ranks}}}",
    )


FIRST = "save(1)\n"
LAST = "save(2)"

CHECKPOINT: tuple[Fault, ...] = (
    saving(
        Fault(
            "SIGKILL of a rank that saves a checkpoint, before its file is made",
            f"{FIRST}before(folder.Draft, 'create', lambda: kill(9))\n{LAST}",
            137,
            killed("1"),
        ),
        restored=1,
    ),
    saving(
        Fault(
            "SIGKILL of a rank that saves a checkpoint, the second of its node, while it writes",
            f"{FIRST}before(folder, '_write', lambda: kill(9), rank=3)\n{LAST}",
            137,
            killed("3"),
            ranks=4,
        ),
        restored=1,
        build="node_size=2",
    ),
    saving(
        Fault(
            "SIGKILL of a rank that saves a checkpoint, between its file and its manifest",
            f"{FIRST}before(folder.Draft, 'commit', lambda: kill(9))\n{LAST}",
            137,
            killed("1"),
        ),
        restored=1,
        build="own_disks=True",
    ),
    saving(
        Fault(
            "SIGKILL of a rank that saves a checkpoint, when another's manifest is there",
            "def late():\n"
            "    while not os.path.exists(directory() + '/checkpoint-000001/manifest.json'):\n"
            "        time.sleep(0.01)\n"
            "    kill(9)\n"
            f"{FIRST}before(folder.Draft, 'commit', late)\n{LAST}",
            137,
            killed("1"),
        ),
        restored=2,
    ),
    saving(
        Fault(
            "interrupt of a rank that saves a checkpoint",
            f"{FIRST}before(folder.Draft, 'write', interrupt)\n{LAST}",
            1,
            interrupted(1),
        ),
        restored=1,
    ),
    saving(
        Fault(
            "interrupt of a rank that saves a checkpoint, when others delete the one before",
            "def late(*arguments):\n"
            "    agreed(*arguments)\n"
            "    if os.path.exists(directory() + '/checkpoint-000001/manifest.json'):\n"
            "        while os.path.exists(directory() + '/checkpoint-000000'):\n"
            "            time.sleep(0.01)\n"
            "        interrupt()\n"
            "agreed = job.require_success\n"
            f"{FIRST}"
            "if hvd.rank() == 0:\n"
            "    job.require_success = late\n"
            "save(2, keep=1)",
            1,
            interrupted(0),
        ),
        restored=2,
    ),
    Fault(
        "a full disk of one of several nodes",
        f"{SAVING}save, restore = build(own_disks=True)\n"
        "if hvd.rank() == 1:\n"
        "    shrink(directory(own_disks=True))\n"
        f"{FIRST}say()\n"
        "try:\n"
        "    save(2, ballast=100_000)\n"
        "except hvd.CheckpointError:\n"
        "    restore()\n"
        "    raise",
        1,
        r"(?s)(restored 1\s.*){2}CheckpointError: save_checkpoint: rank 1: [^\n]*: "
        r"(No space left on device|File too large)\.",
    ),
)
