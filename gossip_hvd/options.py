"""How an engine runs a method: seed, timing, wire; the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from gossip_hvd.errors import ConfigError, unknown
from gossip_hvd.finite import NAN_POLICIES
from gossip_hvd.segments import ALIGN, LARGEST_MESSAGE
from gossip_hvd.settings import setting
from gossip_hvd.staleness import LONGEST
from gossip_hvd.transport.traffic import Traffic

TIMINGS = ("atc", "awc")
PROGRESS = ("auto", "thread", "hooks")
FEWEST_ASKS = 4
CHUNK, CHUNK_ON_HOST = 1 << 18, 1 << 22
WIRE_DTYPES = (None, "bfloat16", "float16")


@dataclass(frozen=True)
class EngineOptions:
    """What every method shares.

    Attributes:
        seed: of every random choice.
        timing: ``"atc"``: exchange after the local step; ``"awc"``: exchange under the next
            forward and backward, merged at its end.
        staleness: under AWC, for how many steps an exchange that has not arrived is let be; nodes
            then mix more slowly (see ``staleness.py``).
        wire_dtype: ``"bfloat16"`` or ``"float16"`` rounds float32 and float64 values on the wire;
            the mean over nodes stays exact.
        chunk_bytes: the largest message; None for 256 KiB between hosts, and 4 MiB where all nodes
            are on one. What costs time is bytes on a slow link and messages on a fast one.
        asks: messages of that size that a rank has under way at once, each way, for its oldest
            exchange; None for four, or what the link moves in 50 ms where that is more.
        nan_policy: what becomes of a NaN or an infinity in one node's values: ``"raise"`` ends the
            job, ``"skip"`` keeps the cell out of the exchange, ``"ignore"`` lets it spread.
        progress: who moves bytes while the model computes: ``"thread"``, or ``"hooks"``, which
            poll at every gradient and spare the thread; ``"auto"`` is the thread.
    """

    seed: int = 0
    timing: str = "atc"
    staleness: int = 0
    wire_dtype: str | None = None
    chunk_bytes: int | None = None
    asks: int | None = None
    nan_policy: str = "raise"
    progress: str = "auto"

    @classmethod
    def names(cls) -> list[str]:
        """The options that ``take`` takes."""
        return [f.name for f in fields(cls)]

    @classmethod
    def take(cls, options: dict[str, Any]) -> EngineOptions:
        """Take the engine's own options out of ``options``, leaving the method's.

        None stands for the default everywhere.

        Raises:
            ConfigError: for a value that does not exist or cannot work.
        """
        taken = {name: options.pop(name) for name in cls.names() if name in options}
        taken = {name: value for name, value in taken.items() if value is not None}
        taken["seed"] = setting("SEED", taken.get("seed"))
        made = cls(**taken)
        if made.timing not in TIMINGS:
            raise unknown("timing", made.timing, TIMINGS)
        if made.wire_dtype not in WIRE_DTYPES:
            raise unknown("wire_dtype", made.wire_dtype, [w for w in WIRE_DTYPES if w])
        if made.nan_policy not in NAN_POLICIES:
            raise unknown("nan_policy", made.nan_policy, NAN_POLICIES)
        if made.progress not in PROGRESS:
            raise unknown("progress", made.progress, PROGRESS)
        if not 0 <= made.staleness <= LONGEST or (made.staleness and made.timing != "awc"):
            raise ConfigError(
                f"staleness={made.staleness} with timing={made.timing!r}: staleness is 0 or more "
                f"rounds, up to {LONGEST}, and only timing='awc' leaves an exchange in flight."
            )
        chunk = made.largest
        if chunk % ALIGN or not ALIGN <= chunk <= LARGEST_MESSAGE:
            raise ConfigError(
                f"chunk_bytes={made.chunk_bytes}: expected a multiple of {ALIGN}, up to "
                f"{LARGEST_MESSAGE}."
            )
        if made.asks is not None and made.asks < 1:
            raise ConfigError(f"asks={made.asks}: expected 1 message or more, or None.")
        return made

    def over(self, hosts: int) -> EngineOptions:
        """The same with what was left open, for nodes on so many hosts."""
        if self.chunk_bytes is not None:
            return self
        return replace(self, chunk_bytes=CHUNK if hosts > 1 else CHUNK_ON_HOST)

    @property
    def largest(self) -> int:
        """Bytes of the largest message."""
        return CHUNK if self.chunk_bytes is None else self.chunk_bytes

    def traffic(self) -> Traffic:
        """What one rank may have under way at once, in one direction."""
        messages = FEWEST_ASKS if self.asks is None else self.asks
        return Traffic(messages * self.largest, adapts=self.asks is None)
