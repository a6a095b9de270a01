"""World-wide operations matched by name: asked for by any thread, carried out by one of ours.

A rank that asks announces the name to rank 0 (see ``negotiation``) and goes on computing; its
handle is done when all ranks have asked and the values have travelled. All MPI calls are made by
one thread a process, on communicators of its own. Frameworks pass flat NumPy arrays and their
real shapes, so nothing here knows any.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from gossip_hvd.envelopes import (
    decode_requests,
    decode_responses,
    encode_requests,
    encode_responses,
)
from gossip_hvd.errors import OperationError
from gossip_hvd.execution import Asked, Executor
from gossip_hvd.handle import Handle
from gossip_hvd.joining import Steps
from gossip_hvd.mixing import Array
from gossip_hvd.negotiation import SHUT_DOWN, Coordinator
from gossip_hvd.requests import PLAIN, Request, Response
from gossip_hvd.small import packed
from gossip_hvd.transport.mpi import Post, World
from gossip_hvd.waits import Facts, waiting
from gossip_hvd.watch import Watch

log = logging.getLogger("gossip_hvd")

SPIN = 2e-3
"""Seconds for which the thread looks for news without a pause."""

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
        self._executor = Executor(world)
        self._post: Post = world.post()
        self._coordinator: Coordinator | None = None
        if world.rank == 0:
            patience = watch.patience
            self._coordinator = Coordinator(
                world.size, patience.stop_after, patience.warn_after, watch.known
            )
        self._watch, self._looked = watch, -1.0
        self._leaving: Handle | None = None
        self._numbers: defaultdict[tuple[str, int], Iterator[int]] = defaultdict(itertools.count)
        self._epoch = 0
        self._new: deque[Request] = deque()
        self._steps, self._watched = Steps(), False
        self._followed: SimpleQueue[str | None] = SimpleQueue()
        self._asked: dict[tuple[int, str], Asked] = {}
        self._lock = threading.Lock()
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
            dtypes=given or tuple(str(values.dtype) for values in inputs),
            **details,
        )
        handle = Handle(request, self.rank, self._known_by)
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
            self._new.append(packed(request, asked.inputs, self.rank))
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
            self._new.append(report)
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
        self._post.free()

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
        if self._coordinator is None:
            return WATCH
        apart = any(0 not in ranks for ranks in self._coordinator.sets.values())
        return LONG_PAUSE if apart or not self._coordinator.idle else WATCH

    def _serve(self) -> None:
        """Work until nothing that this rank has asked for is left."""
        last = time.monotonic()
        while self._ended is None:
            if self._announce() | self._coordinate() | self._obey():
                last = time.monotonic()
            if not self._asked and not self._new:
                return
            waited = time.monotonic() - last
            if waited > SPIN:
                self._work.wait(PAUSE if waited < PATIENCE else LONG_PAUSE)
                self._work.clear()
            else:
                time.sleep(0)

    def _announce(self) -> bool:
        """Tell the coordinator what has been asked for since the last look."""
        requests = []
        while self._new:
            requests.append(self._new.popleft())
        if requests:
            if self._coordinator is not None:
                self._coordinator.announce(0, requests, self._watch.clock)
            else:
                self._post.send(0, encode_requests(requests))
        return bool(requests)

    def _coordinate(self) -> bool:
        """Hear announcements and send out what is ready; on rank 0."""
        coordinator = self._coordinator
        if coordinator is None:
            return False
        moved = False
        now = self._watch.clock
        while (letter := self._post.receive()) is not None:
            coordinator.announce(letter[0], decode_requests(*letter), now)
            moved = True
        if now != self._looked:
            self._look(coordinator, now)
        self._tell(coordinator.outgoing)
        return moved

    def _look(self, coordinator: Coordinator, now: float) -> None:
        """Whenever the clock has moved: who is awaited, and for how long."""
        self._looked = now
        self._watch.awaited = coordinator.awaited(now - self._watch.ask_after)
        coordinator.look(now)
        for sentence in coordinator.warnings:
            log.warning("gossip_hvd: %s", sentence)
        coordinator.warnings.clear()

    def _tell(self, outgoing: Mapping[int, list[Response]]) -> None:
        """Send every other rank what has been agreed; most are told the very same."""
        letters: dict[tuple[int, ...], bytes] = {}
        others = {rank: said for rank, said in outgoing.items() if said and rank != self.rank}
        for rank, said in others.items():
            same = tuple(map(id, said))
            if same not in letters:
                letters[same] = encode_responses(said)
            self._post.send(rank, letters[same])
        for said in others.values():
            said.clear()

    def _obey(self) -> bool:
        """Carry out what has been agreed, in the order in which it was."""
        if self._coordinator is not None:
            responses = list(self._coordinator.outgoing[0])
            self._coordinator.outgoing[0].clear()
        else:
            letter = self._post.receive()
            responses = [] if letter is None else decode_responses(*letter)
        moved = bool(responses)
        for response in responses:
            self._note(response)
        responses = [one for one in responses if one.request.kind not in ("steps", "watch")]
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
        return moved

    def _note(self, response: Response) -> None:
        """What concerns ranks that are out of data."""
        if response.request.kind == "watch":
            self._watched = True
            self._new.append(self._steps.note(response.request))
        elif response.request.kind == "steps":
            self._followed.put(response.request.name)

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
