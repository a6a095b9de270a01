"""GossipGraD's sample shuffle: samples that have been used move on to the next rank of a ring.

Every rank holds a shard of the data in memory. When it has read a batch, these samples go to rank
r − 1 while it computes, and as many come from rank r + 1 into their places. So each sample is on
one rank at a time, shards keep their size, and after p epochs each of p ranks has seen all samples
without a common file system.

| authors' code (matex-org caffe) | here |
|---|---|
| DataShuffleBegin, DataShuffleEnd | ``take``; a batch may arrive until the epoch ends |
| MPI_Testall during forward and backward | a thread that polls while anything is under way |
| tags 6543 (data), 6544 (labels) | one message a batch, on a communicator of its own |

Cost: every sample is sent once an epoch; memory two batches for every batch under way.

Differs from the authors' code: batches are drawn anew in every epoch. What a rank has not read
when its epoch ends moves on too, so that ranks may stop at different batches.

Reference: Daily, Vishnu, Siegel, Warfel, Amatya, "GossipGraD: Scalable deep learning using gossip
communication based asynchronous gradient descent", 2018 (arXiv 1803.05880).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gossip_hvd import draws
from gossip_hvd.errors import ConfigError
from gossip_hvd.transport import PAUSE, Bytes, Wire
from gossip_hvd.waits import Facts, waiting

T = TypeVar("T")
Rows = NDArray[np.int64]

MOST_BATCHES = 32767
"""A batch's place is its message's tag, and MPI promises no larger ones."""


@dataclass(eq=False)
class _Chunk:
    """One batch that is being exchanged.

    Attributes:
        rows: where the incoming samples will lie.
        received: their bytes, once they are here.
        handles: of the wire, still open.
        buffers: all that the wire uses.
    """

    rows: Rows
    received: Bytes
    handles: list[Any]
    buffers: tuple[Bytes, ...]


class RingShuffle:
    """One rank's shard.

    Args:
        shard: arrays of bytes, shape (samples, bytes of a sample), one for each kind of value;
            changed in place.
        batch: samples in a batch; the last may be smaller.
        wire: for nothing else.
        size: ranks of the ring.
        seed: of the order of samples.

    Attributes:
        epoch: the epoch under way; −1 before the first.

    Raises:
        ConfigError: for shards and batches that cannot be.
    """

    def __init__(
        self, shard: Sequence[NDArray[np.uint8]], batch: int, wire: Wire, size: int, seed: int = 0
    ) -> None:
        lengths = {len(part) for part in shard}
        if len(lengths) != 1 or batch < 1 or not max(lengths):
            raise ConfigError(
                f"RingShuffle: parts of {sorted(lengths)} samples in batches of {batch}: all parts "
                "have one length, and neither is empty."
            )
        self.samples, self.batch, self.size, self.seed = lengths.pop(), batch, size, seed
        if len(self) > MOST_BATCHES:
            raise ConfigError(
                f"RingShuffle: {len(self)} batches an epoch; at most {MOST_BATCHES}: larger "
                "batches, please."
            )
        self.epoch = -1
        self._shard, self._wire = list(shard), wire
        self._order: Rows = np.empty(0, np.int64)
        self._unread: set[int] = set()
        self._under_way: list[_Chunk] = []
        self._moved = 0
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(self.samples / self.batch)

    @property
    def held(self) -> Rows:
        """The rows that hold a sample; those under way are on no rank."""
        here = np.ones(self.samples, bool)
        with self._lock:
            for chunk in self._under_way:
                here[chunk.rows] = False
        return np.flatnonzero(here)

    def begin(self) -> None:
        """The next epoch, in a new order; all of the last one has moved on when this returns."""
        self.finish()
        self.epoch += 1
        self._order = draws.permutations(self.samples, self.seed, self.epoch, (self._wire.rank,))[0]
        self._unread = set(range(len(self)))

    def unread(self, place: int) -> bool:
        """Whether a batch may still be read in this epoch."""
        return place in self._unread

    def take(self, place: int, read: Callable[[Rows], T]) -> T:
        """Read one batch of this epoch, and let its samples go.

        Args:
            place: 0 .. len − 1, each once an epoch; the same on all ranks together.
            read: copies the samples in these rows.
        """
        if place not in self._unread:
            raise ConfigError(
                f"RingShuffle: batch {place} of {len(self)} is not to be read in epoch "
                f"{self.epoch}: each is read once, after begin()."
            )
        rows = self._rows(place)
        result = read(rows)
        self._post(place)
        return result

    def release(self) -> None:
        """Let the samples go that were not read in this epoch."""
        for place in sorted(self._unread):
            self._post(place)

    def finish(self) -> None:
        """End the epoch: return when all samples have moved on; all ranks must call.

        Raises:
            StallError: where a neighbour's samples do not come.
        """
        self.release()
        with waiting(self) as wait:
            while self.poll():
                wait.check()
                time.sleep(PAUSE)

    def facts(self) -> Facts:
        """Who waits for whom; either may have sent and received all that is its own, and left."""
        rank, size = self._wire.rank, self.size
        text = f"rank {rank} waits for the samples of rank {(rank + 1) % size}, epoch {self.epoch}"
        return Facts(text, ((rank + 1) % size, (rank - 1) % size), travels=True)

    def moved(self) -> int:
        """A number that changes with every batch that has moved."""
        return self._moved

    def poll(self) -> int:
        """Move what is under way a little; returns how many batches still are."""
        if self._error is not None:
            raise self._error
        with self._lock:
            for chunk in list(self._under_way):
                done = set(self._wire.test(chunk.handles))
                chunk.handles = [h for i, h in enumerate(chunk.handles) if i not in done]
                if not chunk.handles:
                    self._unpack(chunk)
                    self._moved += 1
                    self._under_way.remove(chunk)
            return len(self._under_way)

    def start(self) -> None:
        """Poll from a thread too, so that samples move while the caller computes."""
        self._thread = threading.Thread(target=self._run, name="gossip-shuffle", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the epoch and the thread; all ranks must call."""
        self.finish()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._work.set()
            thread.join(timeout=10.0)

    def _run(self) -> None:
        try:
            while self._thread is not None:
                self._work.wait()
                self._work.clear()
                while self.poll():
                    time.sleep(PAUSE)
        except BaseException as error:
            self._error = error

    def _rows(self, place: int) -> Rows:
        return self._order[place * self.batch : (place + 1) * self.batch]

    def _post(self, place: int) -> None:
        """Exchange one batch: to rank r − 1, from rank r + 1."""
        self._unread.remove(place)
        if self.size == 1:
            return
        rows, rank = self._rows(place), self._wire.rank
        sent = np.concatenate([part[rows].reshape(-1) for part in self._shard])
        received = np.empty_like(sent)
        with self._lock:
            handles = [
                self._wire.receive((rank + 1) % self.size, place, received),
                self._wire.send((rank - 1) % self.size, place, sent),
            ]
            self._under_way.append(_Chunk(rows, received, handles, (sent, received)))
        self._work.set()

    def _unpack(self, chunk: _Chunk) -> None:
        start = 0
        for part in self._shard:
            stop = start + len(chunk.rows) * part.shape[1]
            part[chunk.rows] = chunk.received[start:stop].reshape(len(chunk.rows), -1)
            start = stop
