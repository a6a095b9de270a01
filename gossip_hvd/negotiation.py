"""The coordinator: hears what every rank wants to do, and says in which order all do it.

A pure state machine, in the hands of rank 0. An operation is ready once every rank of its process
set has announced its name, or has joined; all ranks are told of ready operations in one order, so
ranks that ask in different orders never wait for each other. A rank that leaves says so behind its
last announcement: what lacks it then can never be, and fails at once, while what it has announced
is still carried out. Cost: one message to rank 0 and one
back, for as many operations as are waiting; the smallest carry their values in these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from gossip_hvd.joining import Joining
from gossip_hvd.requests import Request, Response, agreed
from gossip_hvd.small import answered

SHUT_DOWN = (
    "gossip_hvd has been shut down. This was caused by an exception on one of the ranks or an "
    "attempt to use an operation after one of the ranks finished execution."
)

Key = tuple[int, str]
"""A process set's number and an operation's name."""


@dataclass
class _Waiting:
    """An operation that some ranks have announced."""

    since: float
    requests: dict[int, Request] = field(default_factory=dict)
    warned: bool = False


class Coordinator:
    """Collects announcements and orders operations.

    Args:
        size: number of ranks of the world.
        limit: seconds after which an operation that lacks ranks fails.
        warn: seconds after which it is named in a warning.
        known: what is known of ranks, as sentences.

    Attributes:
        sets: world ranks of every process set, by number; 0 is the world.
        outgoing: by rank, the responses that it has not been sent yet.
        warnings: sentences about operations that wait for long, to be logged.
    """

    def __init__(
        self,
        size: int,
        limit: float,
        warn: float = 60.0,
        known: Callable[[Sequence[int]], str] = lambda ranks: "",
    ) -> None:
        self.sets: dict[int, tuple[int, ...]] = {0: tuple(range(size))}
        self.outgoing: dict[int, list[Response]] = {rank: [] for rank in range(size)}
        self.warnings: list[str] = []
        self._limit, self._warn, self._known = limit, warn, known
        self._waiting: dict[Key, _Waiting] = {}
        self._joining = Joining(size)
        self._gone: set[int] = set()
        self._failed: dict[tuple[int, Key], str] = {}
        self._next_set = 1
        self._order = 0

    @property
    def idle(self) -> bool:
        """Whether no operation waits for ranks."""
        return not self._waiting

    def announce(self, rank: int, requests: Sequence[Request], now: float) -> None:
        """Note what ``rank`` wants to do.

        Args:
            rank: world rank.
            requests: in the order in which it asked.
            now: seconds on any clock.
        """
        for request in requests:
            key = (request.members, request.name)
            if request.kind == "join":
                self._join(rank, request)
            elif request.kind == "steps":
                self._joining.heard(rank, request)
                self._lead()
            elif request.kind == "shutdown":
                self._leave(rank, request)
            elif (rank, key) in self._failed:
                error = self._failed.pop((rank, key))
                self.outgoing[rank].append(Response(_bare(request), error))
            else:
                waiting = self._waiting.setdefault(key, _Waiting(now))
                waiting.requests[rank] = request
                self._settle(key)

    def awaited(self, since: float) -> tuple[int, ...]:
        """The ranks that an operation lacks which has waited from before ``since``."""
        late = [key for key, waiting in self._waiting.items() if waiting.since < since]
        return tuple(sorted({rank for key in late for rank in self._missing(key)}))

    def look(self, now: float) -> None:
        """Warn about operations that have waited for long, and fail those past the limit."""
        for key, waiting in list(self._waiting.items()):
            waited = now - waiting.since
            if waited > self._limit:
                self._fail(key, self._stall(key, waiting, waited))
            elif waited > self._warn and not waiting.warned:
                waiting.warned = True
                self.warnings.append(self._stall(key, waiting, waited))

    def _settle(self, key: Key) -> None:
        """Order an operation if nobody is missing any more."""
        ranks = self.sets.get(key[0])
        waiting = self._waiting[key]
        if ranks is None:
            self._fail(key, f"process set {key[0]} does not exist or has been removed.")
            return
        if not self._gone and len(waiting.requests) + len(self._joining.order) < len(ranks):
            return  # Too few to be all, which is cheaper than asking who is missing.
        missing = self._missing(key)
        if self._gone.intersection(missing):
            what = f"{next(iter(waiting.requests.values())).kind} {key[1]!r}"
            self._fail(key, self._left(what, missing))
        elif not missing:
            del self._waiting[key]
            response = self._changed(agreed(waiting.requests, ranks))
            self._tell(ranks, answered(response, waiting.requests, len(ranks)))

    def _missing(self, key: Key) -> list[int]:
        """Whom an operation waits for."""
        asked, joined = self._waiting[key].requests, self._joining.order
        return [r for r in self.sets.get(key[0], ()) if r not in asked and r not in joined]

    def _left(self, what: str, missing: Sequence[int]) -> str:
        ranks = sorted(self._gone.intersection(missing))
        return (
            f"{what} lacks ranks {ranks}, which have left: their program ended, or called sys.exit "
            f"or shutdown. {SHUT_DOWN}"
        )

    def _changed(self, response: Response) -> Response:
        """Carry out what a response changes here."""
        request = response.request
        if response.error:
            return response
        if request.kind == "add_process_set":
            if request.splits in self.sets.values():
                error = f"Attempted to add a duplicate process set: {list(request.splits)}"
                return response._replace(error=error)
            number, self._next_set = self._next_set, self._next_set + 1
            self.sets[number] = request.splits
            return response._replace(rows=((number,),))
        removed = request.kind == "remove_process_set"
        if removed and self.sets.pop(request.splits[0], None) is None:
            return response._replace(error=f"There is no process set {request.splits[0]}.")
        return response

    def _join(self, rank: int, request: Request) -> None:
        if self._gone:
            self._tell_in_vain((rank,))
            return
        for other, watch in self._joining.join(rank, request):
            self._tell((other,), Response(watch))
        for key in self._names():
            self._settle(key)
        self._lead()

    def _lead(self) -> None:
        """Tell ranks that have joined which steps to follow, and all when there are no more."""
        for rank, step in self._joining.following():
            self._tell((rank,), Response(step))
        if self._joining.over:
            order = tuple(self._joining.order)
            error = self._joining.finish()
            self._tell(self.sets[0], Response(Request("join", "join"), error, (order,)))

    def _tell_in_vain(self, joined: Sequence[int]) -> None:
        """Not all can join any more."""
        for rank in joined:
            error = self._left("join", self.sets[0])
            self.outgoing[rank].append(Response(Request("join", "join"), error))

    def _leave(self, rank: int, request: Request) -> None:
        """A rank shuts down: what waits for it can never happen."""
        self._gone.add(rank)
        self._tell_in_vain(self._joining.order)
        self._joining.finish()
        for key in self._names():
            self._settle(key)
        if len(self._gone) == len(self.sets[0]):
            self._tell(self.sets[0], Response(request))

    def _names(self) -> Iterator[Key]:
        return iter(list(self._waiting))

    def _tell(self, ranks: tuple[int, ...], response: Response) -> None:
        self._order += 1
        response = response._replace(order=self._order)
        for rank in ranks:
            self.outgoing[rank].append(response)

    def _fail(self, key: Key, error: str) -> None:
        waiting = self._waiting.pop(key)
        first = next(iter(waiting.requests.values()))
        for rank in waiting.requests:
            self.outgoing[rank].append(Response(_bare(first), error))
        # Who comes later is told at once instead of waiting for ranks that have given up.
        for rank in self.sets.get(key[0], ()):
            if rank not in waiting.requests:
                self._failed[rank, key] = error

    def _stall(self, key: Key, waiting: _Waiting, waited: float) -> str:
        first, missing = next(iter(waiting.requests.values())), self._missing(key)
        return (
            f"{first.kind} {key[1]!r} has waited {waited:.0f} s for ranks {missing}; ranks "
            f"{sorted(waiting.requests)} are ready. Do all ranks call it, under the same name? "
            f"The limit is GOSSIP_HVD_STALL_TIMEOUT seconds. {self._known(missing)}"
        ).rstrip()


def _bare(request: Request) -> Request:
    return request._replace(shapes=(), dtypes=(), splits=(), values=b"")
