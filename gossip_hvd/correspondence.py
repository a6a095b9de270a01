"""The letters of named operations: what a rank asks for on its way to rank 0, and the answers.

Rank 0 takes the others' letters, agrees (see ``negotiation``) and answers. Used by one thread at a
time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping

from gossip_hvd.envelopes import (
    decode_requests,
    decode_responses,
    encode_requests,
    encode_responses,
)
from gossip_hvd.negotiation import Coordinator
from gossip_hvd.requests import Request, Response
from gossip_hvd.transport.mpi import Post, World
from gossip_hvd.watch import Watch

log = logging.getLogger("gossip_hvd")


class Correspondence:
    """One rank's letters.

    Args:
        world: all ranks.
        watch: of this rank; its patience holds for operations that some ranks have not asked for.

    Attributes:
        new: what has been asked for and not been announced; any thread may append.
        coordinator: who agrees; on rank 0.
    """

    def __init__(self, world: World, watch: Watch) -> None:
        self.new: deque[Request] = deque()
        self.coordinator: Coordinator | None = None
        self._rank, self._watch, self._looked = world.rank, watch, -1.0
        self._post: Post = world.post()
        if world.rank == 0:
            patience = watch.patience
            self.coordinator = Coordinator(
                world.size, patience.stop_after, patience.warn_after, watch.known
            )

    def free(self) -> None:
        """Give the communicator back once all letters have left; collective."""
        self._post.free()

    @property
    def quiet(self) -> bool:
        """Whether there is nothing to tell and nothing to hear; an interrupt may part this."""
        return not self.new and not self._post.arrived()

    def announce(self) -> bool:
        """Tell the coordinator what has been asked for; whether there was anything."""
        requests = []
        while self.new:
            requests.append(self.new.popleft())
        if requests:
            if self.coordinator is not None:
                self.coordinator.announce(0, requests, self._watch.clock)
            else:
                self._post.send(0, encode_requests(requests))
        return bool(requests)

    def coordinate(self) -> bool:
        """Hear announcements and send out what is ready; on rank 0."""
        coordinator = self.coordinator
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

    def hear(self) -> list[Response]:
        """What one letter says has been agreed; parted alike on all ranks that are told."""
        if self.coordinator is not None:
            responses = list(self.coordinator.outgoing[0])
            self.coordinator.outgoing[0].clear()
            return responses
        letter = self._post.receive()
        return [] if letter is None else decode_responses(*letter)

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
        others = {rank: said for rank, said in outgoing.items() if said and rank != self._rank}
        for rank, said in others.items():
            same = tuple(map(id, said))
            if same not in letters:
                letters[same] = encode_responses(said)
            self._post.send(rank, letters[same])
        for said in others.values():
            said.clear()
