"""One model's part in the gossip, whatever its framework: what ``optimizer.gossip`` is.

An adapter says when a gradient reduction is complete and when the local step is over; this
decides when rounds run, and offers what users ask for beside training.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gossip_hvd.agreement import require_agreement, require_success
from gossip_hvd.engine import Engine
from gossip_hvd.errors import CheckpointError, ConfigError
from gossip_hvd.memory import Memory, PlainMemory
from gossip_hvd.methods import Method
from gossip_hvd.options import EngineOptions
from gossip_hvd.progress import Steps, ThreadProgress, drive
from gossip_hvd.recorder import Recorder
from gossip_hvd.rounds import WEIGHTS
from gossip_hvd.saved import begin_at, checked, plain_state, set_state
from gossip_hvd.seat import Seat
from gossip_hvd.segments import Layout
from gossip_hvd.session import Session

_counter = itertools.count()
_running: weakref.WeakValueDictionary[int, Gossip] = weakref.WeakValueDictionary()


class Gossip:
    """The rounds of one model on this rank.

    Args:
        current: the running session.
        method: how the nodes train together.
        options: of the engine.
        facts: what all ranks must hold equal beside method and options, such as shapes.

    Attributes:
        method: as given.
        options: as given.
        engine: runs the rounds.
        key: a name for operations, equal on all ranks and different for every model.

    Raises:
        ConfigError: on every rank, where ranks differ.
    """

    engine: Engine

    def __init__(
        self,
        current: Session,
        method: Method,
        options: EngineOptions,
        facts: Mapping[str, object],
    ) -> None:
        options = options.over(len(set(current.world.hosts)))
        self.session, self.method, self.options = current, method, options
        self._number = next(_counter)
        self.key = f"gossip_hvd.{self._number}"
        everything = {"method": method, "engine options": options, **facts}
        require_agreement(current.world, "DistributedOptimizer", everything)
        self._wire = current.world.wire()
        self._record = Recorder(key=self.key)
        current.watch.recorders.add(self._record)

    # What users call -------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Rounds of gossip posted so far."""
        return self.engine.number

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent to other nodes so far."""
        return self.engine.seat.record.bytes_sent

    @property
    def bytes_shared(self) -> int:
        """Bytes that this rank has sent to the other ranks of its node so far."""
        return self.engine.seat.record.bytes_shared

    @property
    def layout(self) -> Layout:
        """Where parameters lie in the flat buffer and how it is cut into segments."""
        return self.engine.seat.layout

    def drain(self) -> None:
        """Run every round that is owed and merge the exchange in flight; all ranks must call."""
        self._run(self.engine.drain())

    def state_dict(self, *, drain: bool = False) -> dict[str, Any]:
        """What this rank's gossip must know to go on: numbers, strings, lists and flat arrays.

        Every rank saves its own, between two steps, together with model and optimizer. An
        exchange in flight is part of it, so that saving changes nothing and waits for nobody;
        with ``staleness`` it is landed first.

        Args:
            drain: land the exchange in flight first; all ranks must call.
        """
        if drain or self.options.staleness:
            self.drain()
        else:
            self.pay()
        return plain_state(self.engine)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave; all ranks must call, each with its own.

        Load model and optimizer first: an exchange in flight is posted again at once.

        Raises:
            CheckpointError: on every rank, where one rank's state is damaged or does not fit, or
                where ranks have states of different rounds.
        """
        what, world = "load_state_dict", self.session.world
        saved, failure = None, ""
        try:
            saved = checked(state, self.engine)
        except CheckpointError as error:
            failure = str(error)
        require_success(world, what, failure)
        assert saved is not None
        facts = {"the saved round": saved.round, "an exchange in flight": saved.posted is not None}
        try:
            require_agreement(world, what, facts)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        # What is still in flight may not be merged into weights that have been loaded.
        self._run(self.engine.discard())
        set_state(self.engine, saved)

    def begin_at(self, number: int) -> None:
        """Count on from round ``number`` and let the method begin again; all ranks must call.

        For weights that have been made equal on all nodes.
        """
        self._run(self.engine.discard())
        begin_at(self.engine, number)

    def average_parameters(self) -> None:
        """Replace every node's weights by their exact mean, the same bits everywhere.

        Each node counts once, which is the mean over ranks where nodes are equally large, and
        the mean that gossip conserves in any case. All ranks must call.
        """
        self._run(self.engine.average(WEIGHTS))

    def consensus_distance(self) -> float:
        """Ξ = √((1/n) Σᵢ ‖xᵢ − x̄‖²) over the n nodes; all ranks must call."""
        self.drain()
        memory = self.engine.seat.memory
        memory.load([WEIGHTS])
        mean = PlainMemory({WEIGHTS: memory[WEIGHTS].copy()})
        self._run(self.engine.deviation(mean))
        square = self.engine.squared_deviation(mean[WEIGHTS])
        total = self.session.world.sum([square], "consensus_distance")[0]
        return float((total / len(self.session.cluster.nodes)) ** 0.5)

    # What adapters call ----------------------------------------------------------------------

    @property
    def delegated(self) -> bool:
        """Whether Horovod itself reduces over the whole world, so that nothing is left to do."""
        return self.method.name == "allreduce" and self.session.scope == "world"

    @property
    def slots(self) -> tuple[str, ...]:
        """The payload slots that a memory must hold."""
        return tuple(dict.fromkeys((WEIGHTS, *self.method.writes, *self.method.reads)))

    def build(self, layout: Layout, memory: Memory) -> None:
        """Make the engine for a model, or again for one whose parameters have changed."""
        current, before = self.session, getattr(self, "engine", None)
        if before is not None:
            before.close()
        seat = Seat(
            current.cluster,
            current.world.rank,
            layout,
            self._wire,
            memory,
            wire_dtype=self.options.wire_dtype,
            largest=self.options.largest,
            asking=self.options.traffic(),
            sending=self.options.traffic(),
            nan_policy=self.options.nan_policy,
            record=self._record,
        )
        late = self.options.timing == "awc" and len(current.cluster.nodes) > 1
        threaded = late and self.options.progress != "hooks"
        self.engine = Engine(
            seat,
            self.method,
            seed=self.options.seed,
            timing=self.options.timing,
            staleness=self.options.staleness,
            progress=ThreadProgress() if threaded else None,
        )
        if before is not None:
            self.engine.resume(before)
            return
        _running[self._number] = self
        # Not the method itself: a model that nobody uses any more must be free to go.
        close = weakref.WeakMethod(self.close)
        current.closers.append(lambda: (alive := close()) and alive())

    def learn(self, rates: Sequence[float]) -> None:
        """Before ``reduced``, where the method needs it: the learning rate of every field."""
        self.engine.learn(rates)

    def poll(self) -> None:
        """From a hook: move the exchange in flight a little, where no thread does."""
        self.engine.poll()

    def stepping(self) -> None:
        """Directly before the local step."""
        if not self.delegated and not self.engine.alone:
            self.engine.before_step()

    def reduced(self) -> None:
        """At the end of a backward whose gradients have been averaged over the node."""
        if self.delegated or self.engine.alone:
            return
        if self.engine.when == "reduction":
            self.engine.reduced()
            self._run(self.engine.step())
            return
        # Not before backward: autograd would not notice that weights changed under it.
        if self.pay():
            self.completed()
        self.engine.reduced()

    def stepped(self) -> None:
        """After the local step: run the rounds that are due."""
        self._run(self.engine.step())

    def completed(self) -> None:
        """An optimizer's step is over: the place to leave, where all ranks were asked to."""
        self.session.terminator.stepped()

    def pay(self) -> bool:
        """Run the round of a step that was skipped, by a loss scaler say; its peers wait for it.

        Returns:
            Whether there was one.
        """
        skipped = self.engine.owed > self.engine.credit
        if skipped:
            self._run(self.engine.step())
        return skipped

    def close(self) -> None:
        """Finish every round and stop; all ranks must call."""
        self.drain()
        self.engine.close()

    def _run(self, steps: Steps) -> None:
        drive(steps)


def forget(number: int) -> None:
    """The gossip of this number is not in use any more, whoever may still hold it."""
    _running.pop(number, None)


def running() -> Iterator[Gossip]:
    """Every model's gossip that is still in use, in the order in which they were made."""
    return iter([_running[number] for number in sorted(_running)])
