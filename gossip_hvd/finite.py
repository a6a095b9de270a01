"""Keep a NaN or an infinity in one node's values from spreading to others.

``"raise"`` looks at each cell once it is mixed and ends the job with the name of the node that it
came from. ``"skip"`` looks at what was sent and received before it is mixed: a pair of nodes of
which one sent a value that is not finite keeps its cell as it is, on both sides, since both see the
same two messages. With an exchange that is mutual, w_ij = w_ji, what i no longer gives to j is what
j no longer gives to i, so the sum over the other nodes does not change. Where exchanges are not
mutual (a random circular shift, push-sum) one side's loss would not be the other's, and in an exact
mean there is no pair: there ``"skip"`` is refused. ``"ignore"`` looks at nothing.

Gradients are never looked at: under a loss scaler they overflow in the ordinary course of things,
on all nodes alike once averaged, and the step is skipped.

Cost: one dot product of the cell with itself, while it is in the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from gossip_hvd.errors import ConfigError, NotFiniteError
from gossip_hvd.mixing import Array
from gossip_hvd.rounds import GRADIENTS, Stage, Transfer

log = logging.getLogger("gossip_hvd")

NAN_POLICIES = ("raise", "skip", "ignore")

Arrived = Sequence[tuple[Transfer, Array]]

EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits of a 16-bit float that are all 1 where it is not finite."""


def policy_of(policy: str, slot: str) -> str:
    """The policy for one payload slot."""
    return "ignore" if slot == GRADIENTS else policy


def finite(values: Array) -> bool:
    """Whether no element is a NaN or an infinity; 1-D floats of any size."""
    if (bits := EXPONENT.get(values.dtype.name)) is not None:
        return not bool(np.any((values.view(np.uint16) & bits) == bits))
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.dot(values, values)
    # Large values overflow in their squares.
    return bool(np.isfinite(square)) or bool(np.isfinite(values).all())


def healthy(where: str, stage: Stage, sent: Array, arrived: Arrived) -> Arrived:
    """What may be mixed under ``"skip"``.

    Args:
        where: rank, node and round, for errors.
        stage: of the round.
        sent: this node's values as they went out.
        arrived: the peers'.

    Raises:
        ConfigError: where the stage is no mutual exchange.
    """
    if stage.rule != "mix" or _ends(stage.sends) != _ends(stage.receives):
        raise ConfigError(
            f"{where}: nan_policy='skip' needs mutual exchanges, in which two nodes give each "
            "other equal weights, and no exact mean; this round is not such. Use "
            "nan_policy='raise', or a method with equal weights both ways, such as gossip with "
            "topology='random_matching'."
        )
    if not finite(sent):
        _tell(where, -1)
        return ()
    return [one for one in arrived if finite(one[1]) or _tell(where, one[0].peer)]


def refusal(where: str, node: int, sent: Array, arrived: Arrived) -> NotFiniteError:
    """The error of ``"raise"``; names the node whose values are not finite.

    Args:
        where: rank, node, round and segment.
        node: this rank's.
        sent: this node's values as they went out, or as they are now.
        arrived: the peers'.
    """
    guilty = [t.peer for t, values in arrived if not finite(values)] or [node]
    return NotFiniteError(
        f"{where}: values of node {guilty[0]} are not finite (NaN or infinite), and would spread "
        "to all nodes. Look at its data, loss and learning rate; nan_policy='skip' leaves such "
        "values out, nan_policy='ignore' does not look."
    )


def _tell(where: str, peer: int) -> bool:
    """Say once of each node that its values are left out; returns False."""
    if peer not in _told:
        _told.add(peer)
        whose = f"values of node {peer}" if peer >= 0 else "this node's own values"
        log.warning("gossip_hvd: %s: %s are not finite and are left out.", where, whose)
    return False


_told: set[int] = set()


def _ends(transfers: Sequence[Transfer]) -> list[tuple[int, str, int, float]]:
    return sorted((t.peer, t.slot, t.unit, t.weight) for t in transfers)
