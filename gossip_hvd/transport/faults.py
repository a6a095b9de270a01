"""Faults of the network and of ranks, by seed, for the memory wire and the simulation.

They happen beneath the wire's promises, as they do beneath MPI's: a message that comes late, twice
or out of order is put right, one that is lost or cut is missed. The seed alone decides, so a run
can be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gossip_hvd.draws import word

HARMLESS = ("delay", "duplicate", "reorder")
HARMFUL = ("drop", "truncate")

LATE = 40
"""Tests of its receiver for which a message that is delayed stays under way, at most."""


MESSAGES, LATENESS, TURNS = 0, 1, 2
"""What is drawn; turns of rank r at ``TURNS + r``."""


@dataclass(frozen=True)
class Faults:
    """What befalls messages and ranks.

    Attributes:
        seed: decides which messages.
        rates: by kind, how likely a message is hit; kinds are ``HARMLESS`` and ``HARMFUL``.
        schedule: by number of the message, counted over all that are sent: what befalls it.
        slow: by rank, how likely one of its turns is lost.
        stopped: by rank, after how many turns it stands still for good.
    """

    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    schedule: Mapping[int, str] = field(default_factory=dict)
    slow: Mapping[int, float] = field(default_factory=dict)
    stopped: Mapping[int, int] = field(default_factory=dict)

    def fate(self, number: int) -> str:
        """What befalls the message of this number; empty for nothing."""
        if number in self.schedule:
            return self.schedule[number]
        chance = self._chance(MESSAGES, number)
        for kind, rate in self.rates.items():
            if chance < rate:
                return kind
            chance -= rate
        return ""

    def lateness(self, number: int) -> int:
        """For how many tests more a delayed message is under way."""
        return 1 + int(LATE * self._chance(LATENESS, number))

    def loses_turn(self, rank: int, turn: int) -> bool:
        """Whether this rank does nothing in its turn."""
        if rank in self.stopped and turn >= self.stopped[rank]:
            return True
        return rank in self.slow and self._chance(TURNS + rank, turn) < self.slow[rank]

    def _chance(self, about: int, number: int) -> float:
        """A number of [0, 1)."""
        return word(self.seed, about, 0, number) / 2**64


NONE = Faults()
