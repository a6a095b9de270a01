"""World-wide operations matched by name: asked for by any thread, carried out by one of ours.

A rank that asks announces the name to rank 0 (see ``negotiation``) and goes on computing; its
handle is done when all ranks have asked and the values have travelled. All MPI calls are made by
one thread at a time, on communicators of their own: by ours, or by one that waits for a small
operation and has nothing else to do. Frameworks pass flat NumPy arrays and their real shapes, so
nothing here knows any.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from gossip_hvd.correspondence import Correspondence
from gossip_hvd.errors import OperationError
from gossip_hvd.execution import Asked, Executor
from gossip_hvd.handle import Handle
from gossip_hvd.interrupts import put_off
from gossip_hvd.joining import Steps
from gossip_hvd.mixing import Array, name_of
from gossip_hvd.negotiation import SHUT_DOWN
from gossip_hvd.requests import PLAIN, Request, Response
from gossip_hvd.small import is_small, packed
from gossip_hvd.transport.mpi import World
from gossip_hvd.waits import Facts, waiting
from gossip_hvd.watch import Watch

SPIN = 2e-3
"""Seconds for which our thread looks for news without a pause, ..."""

HELP = 1e-2
"""... and for which one does that waits itself, and so takes no time from anybody's program."""

PAUSE = 1e-4
"""Seconds between looks afterwards, and ..."""

LONG_PAUSE = 1e-3
"""... after waiting for ``PATIENCE`` seconds, or while rank 0 has asked for nothing itself."""

PATIENCE = 0.05

WATCH = 0.1
"""Seconds between looks of rank 0 while nobody waits, as far as it knows."""


class Operations:
    """The named operations of one process; made and closed by all ranks together.

    Args:
        world: all ranks.
        watch: of this rank; its patience holds for operations that some ranks have not asked for.
    """

    def __init__(self, world: World, watch: Watch) -> None:
        self.rank, self.size = world.rank, world.size
        self._executor, self._letters = Executor(world), Correspondence(world, watch)
        self._watch = watch
        self._leaving: Handle | None = None
        self._numbers: defaultdict[tuple[str, int], Iterator[int]] = defaultdict(itertools.count)
        self._epoch = 0
        self._steps, self._watched = Steps(), False
        self._followed: SimpleQueue[str | None] = SimpleQueue()
        self._asked: dict[tuple[int, str], Asked] = {}
        self._agreed: list[Response] = []
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # Held by the thread that works.
        self._work = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="gossip-operations", daemon=True)
        self._thread.start()

    @property
    def sets(self) -> dict[int, tuple[int, ...]]:
        """World ranks of every process set, by number."""
        return self._executor.sets

    def submit(
        self,
        kind: str,
        name: str | None,
        inputs: Sequence[Array] = (),
        shapes: Sequence[Sequence[int]] = (),
        outputs: Sequence[Array] | None = None,
        given: tuple[str, ...] = (),
        awaited: bool = False,
        **details: Any,
    ) -> Handle:
        """Ask for an operation; returns at once.

        Args:
            kind: one of ``requests.KINDS``.
            name: unique among operations under way; None takes the next number of this kind.
            inputs: contiguous 1-D arrays, not to be changed before the handle is done.
            shapes: their real shapes.
            outputs: where results go, for operations whose results have the inputs' shapes;
                may be the inputs.
            given: dtypes in place of the inputs'.
            awaited: whether the caller's next call is ``wait``, which may then do the work.
            details: further fields of ``Request``.

        Raises:
            OperationError: where the name is in use, or the operations have ended.
        """
        members = details.get("members", 0)
        if name is None:
            name = self.next_name(kind, members)
        details |= {key: plain(details[key]) for key, plain in PLAIN.items() if key in details}
        request = Request(
            kind,
            name,
            shapes=tuple(tuple(int(n) for n in shape) for shape in shapes),
            dtypes=given or tuple(name_of(values.dtype) for values in inputs),
            **details,
        )
        awaited = awaited and is_small(request)
        handle = Handle(request, self.rank, self._known_by, self._help if awaited else None)
        asked = Asked(handle, list(inputs), list(outputs or ()))
        key = (members, name)
        with self._lock:
            if self._ended is not None:
                raise OperationError(str(self._ended))
            if self._leaving is not None:
                raise OperationError(SHUT_DOWN)
            if kind == "shutdown":
                self._leaving = handle
            if key in self._asked:
                raise OperationError(
                    f"Requested to {kind} a tensor with the same name as another tensor that is "
                    f"currently being processed: {name!r}. If you want to request another "
                    "tensor, use a different tensor name."
                )
            self._asked[key] = asked
            self._letters.new.append(packed(request, inputs, self.rank))
        if not awaited:
            self._work.set()
        return handle

    def next_name(self, kind: str, members: int = 0) -> str:
        """The name of an operation that was given none: calls match by their order."""
        return f"{kind}.noname.{self._epoch}.{next(self._numbers[kind, members])}"

    def renumber(self) -> None:
        """Count from the start again, on all ranks, after some have made fewer calls."""
        self._epoch += 1
        self._numbers.clear()

    def step(self, key: str) -> int:
        """Count one step of the optimizer with this key; cheap while nobody has joined.

        Call it when this rank's part of the step can no longer be taken back, and before waiting
        for any other rank's.
        """
        report = self._steps.add(key)
        if self._watched:
            self._letters.new.append(report)
            self._work.set()
        return report.splits[0]

    def shadowed(self, step: int, ranks: Iterable[int]) -> bool:
        """Whether any of these ranks takes part in a step, or has, without data of its own.

        Certain for a step that they have completed together with this rank.
        """
        joined = self._steps.joined
        return any(rank in joined and joined[rank] < step for rank in ranks)

    def join(self, follow: Callable[[str], None]) -> tuple[int, ...]:
        """Say that this rank is out of data; returns once all ranks have said so.

        Args:
            follow: repeats one step of the optimizer with the given key, which calls ``step``.

        Returns:
            All ranks, in the order in which they joined.
        """
        report = self._steps.report("join")
        handle = self.submit("join", "join", splits=report.splits, given=report.dtypes)
        while (key := self._next_followed()) is not None:
            follow(key)
        handle.wait()
        assert handle.response is not None
        return handle.response.rows[0]

    def _next_followed(self) -> str | None:
        text = f"rank {self.rank} has joined and waits for ranks that still have data"
        with waiting(Facts(text), margin=float("inf")):
            return self._followed.get()

    def _known_by(self) -> tuple[int, ...]:
        """Who knows, or is, whom this rank's operations wait for."""
        return self._watch.awaited if self.rank == 0 else (0,)

    def leave(self) -> None:
        """Ask for nothing any more: what others ask of this rank from now on fails at once.

        What it has asked for before is still carried out.
        """
        if self._ended is None and self._leaving is None:
            self.submit("shutdown", "shutdown")

    def close(self) -> None:
        """Wait until all ranks have left, then end the thread; what is under way fails."""
        self.leave()
        if self._leaving is not None:
            self._leaving.wait()
        self._thread.join()
        self._executor.free()
        self._letters.free()

    # The thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._ended is None:
                self._work.wait(self._patience())
                self._work.clear()
                self._serve()
        except BaseException as error:
            # Others would wait for what this rank does not do any more: the job ends, as it does
            # for errors of the main thread.
            sys.excepthook(*sys.exc_info())
            self._end(error)

    def _patience(self) -> float:
        """For how long to sleep when this rank has asked for nothing."""
        coordinator = self._letters.coordinator
        if coordinator is None:
            return WATCH
        apart = any(0 not in ranks for ranks in coordinator.sets.values())
        return LONG_PAUSE if apart or not coordinator.idle else WATCH

    @property
    def _busy(self) -> bool:
        """Whether anything is left that this rank has asked for, or shall do."""
        return bool(self._asked or self._letters.new or self._agreed)

    def _serve(self) -> None:
        """Work until nothing is left."""
        last = time.monotonic()
        while self._ended is None:
            if not self._turn.acquire(blocking=False):
                return  # Who works in this thread's place wakes it up when he stops.
            try:
                if self._advance():
                    last = time.monotonic()
            finally:
                self._turn.release()
            if not self._busy:
                return
            waited = time.monotonic() - last
            if waited > SPIN:
                self._work.wait(PAUSE if waited < PATIENCE else LONG_PAUSE)
                self._work.clear()
            else:
                time.sleep(0)

    def _help(self, handle: Handle) -> None:
        """Work on the thread that waits for a small operation, as long as news come quickly.

        No other need then be woken up, nor wake it.
        """
        if self._turn.acquire(blocking=False):
            try:
                last = time.monotonic()
                while not (handle.done or self._agreed) and time.monotonic() - last < HELP:
                    if self._letters.quiet:
                        os.sched_yield()
                    else:
                        self._advance_unparted()
                        last = time.monotonic()
            finally:
                self._turn.release()
        if self._busy:
            self._work.set()

    def _advance_unparted(self) -> None:
        """On a thread that an interrupt may strike: do all that can be done soon, or end."""
        with put_off():
            try:
                self._advance(briefly=True)
            except BaseException as error:
                self._end(error)
                raise

    def _advance(self, briefly: bool = False) -> bool:
        """Tell, hear and carry out what there is now; whether there was anything.

        Args:
            briefly: leave what calls MPI's collectives, which nobody can break off.
        """
        moved = False
        if not self._agreed:
            moved = self._letters.announce() | self._letters.coordinate()
            heard = self._letters.hear()
            self._agreed = [one for one in heard if not self._concerns_joined(one)]
            moved = moved or bool(heard)
        if self._agreed and (not briefly or all(one.values for one in self._agreed)):
            agreed, self._agreed = self._agreed, []
            self._carry_out(agreed)
            moved = True
        return moved

    def _carry_out(self, responses: Sequence[Response]) -> None:
        """Do what has been agreed, in the order in which it was."""
        for batch in self._executor.batches(responses):
            mine = [self._take(response) for response in batch]
            self._executor.run(batch, mine)
            if batch[0].request.kind == "join":
                self._watched = False
                self._steps.joined.clear()
                if batch[0].order:  # All ranks are told.
                    self.renumber()
                self._followed.put(None)
            if batch[0].request.kind == "shutdown":
                self._end(OperationError(SHUT_DOWN))

    def _concerns_joined(self, response: Response) -> bool:
        """Whether this is about ranks that are out of data, and nothing to carry out."""
        if response.request.kind == "watch":
            self._watched = True
            self._letters.new.append(self._steps.note(response.request))
        elif response.request.kind == "steps":
            self._followed.put(response.request.name)
        else:
            return False
        return True

    def _take(self, response: Response) -> Asked | None:
        """What this rank asked for under a response's name; None where it has joined."""
        with self._lock:
            return self._asked.pop((response.request.members, response.request.name), None)

    def _end(self, error: BaseException) -> None:
        """Let nothing wait for ever."""
        self._watch.awaited = ()
        with self._lock:
            self._ended = error
            left = list(self._asked.values())
            self._asked.clear()
        self._followed.put(None)
        for asked in left:
            asked.handle.fail(OperationError(str(error)))
