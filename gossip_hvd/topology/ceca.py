"""CECA: the exact average of any n after ceil(log2 n) rounds with one peer, from two copies.

Each node keeps x and x^ (`others`: the average of what it has met, itself excluded). With the
bits of n - 1, most significant first, and m (0 at the start) how many others x has met, the
round with bit d sends x if d = 1 and x^ if d = 0, receives c, and mixes

    d = 1:  x <- 1/2 x + 1/2 c               x^ <- m/(2m+1) x^ + (m+1)/(2m+1) c
    d = 0:  x <- (m+1)/(2m+1) x + m/(2m+1) c   x^ <- 1/2 x^ + 1/2 c
    m <- 2m + d

After all bits m = n - 1: x is the average of all. The next sweep starts with m = 0, whose first
round overwrites x^ by c, so x^ needs no initial value.

| paper | here |
|---|---|
| n_ex | `m` |
| tau-th bit of n - 1 | `d` |
| x^, x^hat | x, `others` |

Two ports: send to me + delta, receive from me - delta, delta = m + d. One port (even n): odd
nodes exchange with me + 2m + 1, even ones with me - 2m - 1.

Cost a round: one message each way, the model's bytes; memory one model more.

Reference: Ding, Jin, Ying, Yuan, Yin, "DSGD-CECA", ICML 2023, arXiv:2306.00256.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossip_hvd.errors import ConfigError
from gossip_hvd.topology.contract import log2_ceiling


@dataclass(frozen=True, slots=True)
class TwoCopyMeeting:
    """One node's round of CECA.

    Attributes:
        source: whom this node receives from; None for a single node.
        destination: whom it sends to; None for a single node.
        d: the round's bit: 1 sends x, 0 sends the others' average.
        m: how many others x has met before this round.
    """

    source: int | None
    destination: int | None
    d: int
    m: int

    @property
    def x_weights(self) -> tuple[float, float]:
        """The two numbers of x <- first x + second c."""
        if self.source is None:
            return 1.0, 0.0
        total = 2 * self.m + 1
        return (0.5, 0.5) if self.d else ((self.m + 1) / total, self.m / total)

    @property
    def others_weights(self) -> tuple[float, float]:
        """The two numbers of others <- first others + second c."""
        if self.source is None:
            return 1.0, 0.0
        total = 2 * self.m + 1
        return (self.m / total, (self.m + 1) / total) if self.d else (0.5, 0.5)


@dataclass(frozen=True)
class Ceca:
    """CECA's peers and coefficients; not a `Topology`, since two copies are mixed.

    Attributes:
        ports: 2 sends to one node and receives from another, any n; 1 exchanges with one node,
            even n only.
    """

    ports: int = 2

    def __post_init__(self) -> None:
        """Refuse other numbers of ports."""
        if self.ports not in (1, 2):
            raise ConfigError(f"{self}: ports must be 1 or 2")

    def require(self, n: int) -> None:
        """Raise ConfigError where this schedule does not exist for `n` nodes."""
        if self.ports == 1 and n % 2 and n > 1:
            raise ConfigError(
                f"{self}: {n} nodes are an odd number, and one port exchanges in pairs;"
                " use Ceca(ports=2)"
            )

    def period(self, n: int) -> int:
        """How many rounds a sweep has."""
        self.require(n)
        return max(1, log2_ceiling(n))

    def exact_after(self, n: int) -> int:
        """After how many rounds from the start of a sweep every x is the average."""
        self.require(n)
        return log2_ceiling(n)

    def peers(self, me: int, n: int, round: int) -> TwoCopyMeeting:
        """This node's meeting in one round, the same for all segments and seeds.

        Raises:
            ConfigError: `me` is no node, or one port with an odd number of nodes.
        """
        if not 0 <= me < n or round < 0:
            raise ConfigError(
                f"{self}: cannot plan round {round} of node {me} among {n} node(s);"
                " expected round >= 0 and 0 <= node < nodes"
            )
        self.require(n)
        if n == 1:
            return TwoCopyMeeting(None, None, 1, 0)
        bits = log2_ceiling(n)
        left = bits - 1 - round % bits
        # The bits read so far, as a number, are m.
        d, m = (n - 1) >> left & 1, (n - 1) >> (left + 1)
        if self.ports == 2:
            return TwoCopyMeeting((me - m - d) % n, (me + m + d) % n, d, m)
        partner = (me + (2 * m + 1 if me % 2 else -2 * m - 1)) % n
        return TwoCopyMeeting(partner, partner, d, m)
