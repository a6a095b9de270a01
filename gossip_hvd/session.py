"""The job as this process sees it: started by ``init``, ended by ``shutdown``, one at a time."""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gossip_hvd import __version__
from gossip_hvd.agreement import require_agreement
from gossip_hvd.endings import end_on_errors
from gossip_hvd.errors import ConfigError, unknown
from gossip_hvd.guard import guarded
from gossip_hvd.node import Cluster
from gossip_hvd.operations import Operations
from gossip_hvd.settings import PREFIX, SCOPES, VARIABLES, refuse_unknown, setting
from gossip_hvd.terminate import Terminator
from gossip_hvd.transport import mpi
from gossip_hvd.transport.mpi import Post, World
from gossip_hvd.versions import BENEATH, versions
from gossip_hvd.waits import Facts, waiting
from gossip_hvd.watch import Watch

log = logging.getLogger("gossip_hvd")


class Horovod(Protocol):
    """The part of a ``horovod.<framework>`` module that starting a job needs."""

    def init(self, comm: Any = None, process_sets: Any = None) -> Any:
        """Start Horovod on a communicator."""

    def shutdown(self) -> Any:
        """Stop it."""

    def is_initialized(self) -> bool:
        """Whether it runs."""

    def rank(self) -> int:
        """Rank in Horovod's world."""

    def size(self) -> int:
        """Size of Horovod's world."""


@dataclass
class Session:
    """One initialised job.

    Attributes:
        world: all ranks.
        watch: looks after every wait.
        cluster: the nodes.
        scope: ``"node"`` or ``"world"``.
        node_comm: the communicator of this rank's node.
        arguments: what ``init`` was called with.
        operations: world-wide operations matched by name.
        letters: carries those of the watch.
        process_sets: by framework, this node's Horovod process set; None for a node of one rank.
        node_sets: by framework, in scope ``"world"``, Horovod's process set of every node of
            several ranks.
        frameworks: by name, the Horovod modules that run.
        closers: called in order at shutdown, while all ranks are still there.
        compared: packages of which all ranks have the same version.
    """

    world: World
    watch: Watch
    cluster: Cluster
    scope: str
    node_comm: Any
    arguments: dict[str, Any]
    operations: Operations
    letters: Post
    process_sets: dict[str, Any] = field(default_factory=dict)
    node_sets: dict[str, dict[tuple[int, ...], Any]] = field(default_factory=dict)
    frameworks: dict[str, Horovod] = field(default_factory=dict)
    closers: list[Callable[[], None]] = field(default_factory=list)
    compared: set[str] = field(default_factory=set)

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.cluster.node_of(self.world.rank)

    @property
    def node_ranks(self) -> tuple[int, ...]:
        """World ranks of this rank's node."""
        return self.cluster.nodes[self.node]

    @property
    def terminator(self) -> Terminator:
        """By which all ranks agree on their last step, once they are asked to end."""
        terminator = self.watch.terminator
        assert terminator is not None, "a session's watch is connected"
        return terminator

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within it, a wait may take as long as one at the end of the job, for a disk say."""
        before = self.watch.patience
        self.watch.patience = replace(
            before, stop_after=max(before.stop_after, setting("SHUTDOWN_TIMEOUT"))
        )
        try:
            yield
        finally:
            self.watch.patience = before

    def waits_for(self, ranks: Iterable[int], what: str, *, travels: bool = False) -> Facts:
        """Of a wait of this rank for some others, to do something together with them.

        Args:
            ranks: all that take part.
            what: they do.
            travels: see ``Facts``.
        """
        me = self.world.rank
        others = tuple(rank for rank in ranks if rank != me)
        text = f"rank {me} (node {self.node}) waits for ranks {list(others)} to {what}"
        return Facts(text, others, travels=travels)


_session: Session | None = None


def current() -> Session:
    """The running session.

    Raises:
        ConfigError: before ``init``.
    """
    if _session is None:
        raise ConfigError("gossip_hvd has not been initialised: call hvd.init() first.")
    return _session


def is_initialized() -> bool:
    """Whether ``init`` has been called and ``shutdown`` has not."""
    return _session is not None


def init(
    framework: str,
    hvd: Horovod,
    comm: Any = None,
    process_sets: Any = None,
    *,
    horovod_scope: str | None = None,
    node_size: int | None = None,
    packages: Sequence[str] = (),
) -> None:
    """Start MPI, find the nodes, and start Horovod inside the node or across the world.

    Args:
        framework: ``"torch"`` or ``"tensorflow"``; each has a Horovod of its own.
        hvd: its module.
        comm: an mpi4py communicator or a list of world ranks; by default all.
        process_sets: further process sets, or ``"dynamic"``; in scope ``"node"`` Horovod knows
            the ranks of one node only, and the adapter makes them.
        horovod_scope: ``"node"`` or ``"world"``; else ``GOSSIP_HVD_SCOPE``, else ``"node"``.
        node_size: ranks of a virtual node; else ``GOSSIP_HVD_NODE_SIZE``, else physical nodes.
        packages: above the framework, of which all ranks must have the same version too.

    Raises:
        ConfigError: for a setting that cannot work, or one that differs between ranks.
    """
    global _session
    arguments = {
        "comm": comm if not isinstance(comm, Sequence) else list(comm),
        "process_sets": process_sets,
        "horovod_scope": setting("SCOPE", horovod_scope),
        "node_size": setting("NODE_SIZE", node_size),
    }
    if _session is None:
        if hvd.is_initialized():
            raise ConfigError(
                "Horovod is already initialised: replace `import horovod.… as hvd` by "
                "`import gossip_hvd.… as hvd` and call only its init()."
            )
        _session = _start(arguments)
    elif arguments != _session.arguments:
        changed = [key for key in arguments if arguments[key] != _session.arguments[key]]
        raise ConfigError(
            f"init() was called before with another {changed[0]}: "
            f"{_session.arguments[changed[0]]!r}, now {arguments[changed[0]]!r}. "
            "Call shutdown() first, or init() only once."
        )
    new = [n for n in ("horovod", framework, *packages) if n not in _session.compared]
    if new:
        require_agreement(_session.world, "init", versions(new))
        _session.compared.update(new)
    if framework not in _session.frameworks:
        _start_horovod(_session, framework, hvd, process_sets)
        # Ends are called last in, first out: ours, which waits for all, before Horovod's own,
        # which init has just registered and which stops every rank of its world.
        atexit.unregister(_shutdown_at_exit)
        atexit.register(_shutdown_at_exit)


def on_terminate(callback: Callable[[], None]) -> None:
    """On SIGTERM, which batch systems send before they end a job: save, then leave.

    Whichever ranks receive the signal, all ranks of the job stop after the same step, run their
    callbacks, which may save a checkpoint together, and leave with exit code 143. Call it in the
    main thread of every rank, after ``init``. The launcher must leave time for it: Open MPI's
    mpirun gives its ranks one second when it is itself told to end, or as many as
    ``--mca odls_base_sigkill_timeout`` says.

    Args:
        callback: run after the last step, behind those given before.
    """
    current().terminator.listen(callback)


def shutdown() -> None:
    """Wait for all ranks, then stop and give everything back; a second call does nothing."""
    global _session
    session, _session = _session, None
    if session is None:
        return
    atexit.unregister(_shutdown_at_exit)
    # Another rank may still evaluate or save for long: wait with patience. Rounds that this rank
    # owes come first, since others may be waiting for them before they come here.
    with session.patient():
        for closer in session.closers:
            closer()
        session.terminator.close()
        session.operations.leave()
        session.watch.left = True
        session.world.barrier("shutdown")
        session.operations.close()
        # A fast rank may not close Horovod or MPI under a slow one.
        session.world.barrier("shutdown")
        for hvd in session.frameworks.values():
            hvd.shutdown()
    session.watch.close()
    session.letters.free()
    session.node_comm.Free()
    session.world.free()


def _shutdown_at_exit() -> None:
    """``shutdown``; an error ends the job, where Python itself would only print it."""
    try:
        shutdown()
    except BaseException:
        sys.excepthook(*sys.exc_info())


def _start(arguments: dict[str, Any]) -> Session:
    refuse_unknown()
    scope = arguments["horovod_scope"]
    if scope not in SCOPES:
        raise unknown("horovod_scope", scope, SCOPES)
    try:
        MPI = mpi.start()
    except KeyboardInterrupt:
        # Heard only once MPI runs, whose own end would wait for ranks that wait for this one.
        rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
        end_on_errors(rank, lambda _, code: os._exit(code))
        raise
    comm = arguments["comm"]
    if comm is None:
        comm = MPI.COMM_WORLD
    elif isinstance(comm, list):
        comm = MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.Get_group().Incl(comm))
    _refuse_other_launchers(MPI.COMM_WORLD.Get_size())
    watch = guarded(MPI, comm)
    world = World(MPI, comm)
    letters = world.post()
    watch.connect(letters)
    node_size = arguments["node_size"]
    require_agreement(
        world,
        "init",
        {
            "the version of gossip_hvd": __version__,
            **versions(BENEATH),
            "the version of MPI": MPI.Get_library_version(),
            "horovod_scope": scope,
            "node_size": node_size,
            **{PREFIX + name: os.environ.get(PREFIX + name) for name in VARIABLES},
        },
    )
    cluster = (
        Cluster.by_host(world.hosts)
        if node_size is None
        else Cluster.grouped(world.size, node_size)
    )
    node_comm = world.split(cluster.node_of(world.rank))
    if len(cluster.nodes) == 1 and world.rank == 0:
        log.warning(
            "gossip_hvd: one node of %d rank(s): there is nobody to gossip with.", world.size
        )
    watch.node = cluster.node_of(world.rank)
    operations = Operations(world, watch)
    return Session(world, watch, cluster, scope, node_comm, arguments, operations, letters)


def _refuse_other_launchers(size: int) -> None:
    """Raise where a launcher has started ranks of which MPI knows nothing.

    Each would believe that it is alone, and train for itself.
    """
    for launcher, name in (("horovodrun --gloo", "HOROVOD_SIZE"), ("torchrun", "WORLD_SIZE")):
        started = os.environ.get(name, "")
        if size == 1 and started.isdecimal() and int(started) > 1:
            raise ConfigError(
                f"{name}={started}, and MPI knows one rank: ranks were started by {launcher}, or "
                "that variable is left over. Start them with horovodrun --mpi or mpirun."
            )


def _start_horovod(session: Session, framework: str, hvd: Any, process_sets: Any) -> None:
    if framework == "tensorflow":
        # An all-reduce inside a graph is nobody's to announce: Horovod looks after it itself.
        never, timeout = float("inf"), setting("STALL_TIMEOUT")
        shutdown = 0 if timeout == never else math.ceil(timeout)
        for name, seconds in (
            ("CHECK", math.ceil(setting("STALL_WARNING"))),
            ("SHUTDOWN", shutdown),
        ):
            os.environ.setdefault(f"HOROVOD_STALL_{name}_TIME_SECONDS", str(seconds))
    node = list(session.node_ranks)
    if session.scope == "node":
        with waiting(session.waits_for(node, "start Horovod")):
            hvd.init(comm=session.node_comm)
        expected = (node.index(session.world.rank), len(node))
        session.process_sets[framework] = hvd.global_process_set if len(node) > 1 else None
    else:
        if process_sets == "dynamic":
            os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
            process_sets = None
        # A user may have listed a node too: Horovod takes no ranks twice.
        given = {tuple(s.ranks): s for s in process_sets or () if s.ranks}
        shared = [ranks for ranks in session.cluster.nodes if 1 < len(ranks) < session.world.size]
        sets = {ranks: given.get(ranks) or hvd.ProcessSet(list(ranks)) for ranks in shared}
        extra = [s for s in process_sets or () if tuple(s.ranks or ()) not in sets]
        with waiting(session.waits_for(range(session.world.size), "start Horovod")):
            hvd.init(comm=session.world.comm, process_sets=[*sets.values(), *extra] or None)
        expected = (session.world.rank, session.world.size)
        session.node_sets[framework] = sets
        mine = sets.get(tuple(node), hvd.global_process_set)
        session.process_sets[framework] = mine if len(node) > 1 else None
    if (hvd.rank(), hvd.size()) != expected:
        raise ConfigError(
            f"Horovod says rank {hvd.rank()} of {hvd.size()}, MPI says {expected[0]} of "
            f"{expected[1]}: Horovod and mpi4py use different MPI libraries. Rebuild Horovod "
            "against the MPI that mpi4py loads (make setup does)."
        )
    session.frameworks[framework] = hvd
