"""In a node of several ranks, those that are out of data take each step from one that is not.

A rank that has joined adds zeros to the gradients of its node. What becomes of their mean is for
ranks with data to say: they unscale and clip it, skip the step, have another learning rate. So the
first of them, the *leader*, tells those that have joined what it does, and gives them its weights
when it has stepped. Their part of the gossip is then the node's, bit for bit. Where nobody of the
node has data left, every rank of it steps by itself, all from the last leader's state.

Nothing is sent before a rank of the node has joined, and all know when one has: it takes part in no
reduction before the others have confirmed that they know (see ``joining``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gossip_hvd.gossip import Gossip
from gossip_hvd.rounds import MOMENTUM, VARIANCE
from gossip_hvd.torch.functions import broadcast_state
from gossip_hvd.torch.handles import begin
from gossip_hvd.torch.process_sets import node_process_set

if TYPE_CHECKING:
    from gossip_hvd.torch.gossip import TorchGossip

STEPPED, PAID, NEXT = range(3)
"""What becomes of a gradient: a step; a skipped one, whose round is run; nothing yet."""


class Shadows:
    """Who of a node has data for one model, and who follows.

    Args:
        gossip: the model's.
        optimizer: gives its optimizer.

    Attributes:
        following: whether this rank has joined.
        leader: world rank of whom to follow; None where nobody need be followed, or can be.
        paying: whether the leader runs the round of a step that it has skipped.
        pending: whether it is still to be said what becomes of the last gradient.
    """

    def __init__(self, gossip: TorchGossip, optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        self._gossip, self._optimizer = gossip, optimizer
        self.following = self.paying = self.pending = False
        self.leader: int | None = None

    @property
    def led(self) -> bool:
        """Whether this rank does what another one says."""
        return self.following and self.leader is not None

    def meet(self, step: int, paying: bool) -> None:
        """At the end of each reduction: find out who leads, and with which learning rates.

        Args:
            step: the number of the reduction, counted over all models.
            paying: whether this rank is about to run the round of a step that it has skipped.
        """
        current = self._gossip.session
        ranks = current.node_ranks
        if not self.following and not current.operations.shadowed(step, ranks):
            return
        if len(ranks) == 1:
            return
        out = begin("allgather", [torch.tensor([self.following])], self._name, node_process_set())
        joined = out.synchronize().tolist()
        busy = [rank for rank, gone in zip(ranks, joined, strict=True) if not gone]
        before, self.leader = self.leader, busy[0] if busy else None
        if self.leader is not None:
            rates = [float(group.get("lr", 0.0)) for group in self._optimizer().param_groups]
            first, *rates = self._told([float(paying), *rates])
            self.paying = bool(first)
            self._set_rates(rates)
        elif before is not None:
            self._renew(before)

    def settle(self, what: int) -> int | None:
        """Say, or hear, what becomes of the last gradient; None where that has been said."""
        if not self.pending:
            return None
        self.pending = False
        what = int(self._told([float(what)])[0])
        if what == STEPPED and not self._gossip.engine.alone:
            assert self.leader is not None
            if self.following:
                self._gossip.stepping()
            self._gossip.equalize(self.leader, node_process_set())
            if {MOMENTUM, VARIANCE} & {*self._gossip.slots}:
                self._take_state(self.leader)
        return what

    def skip(self, what: int) -> int | None:
        """As ``settle``, where this rank has not stepped; runs the round where that was said.

        The leader may be about to join while others go on: then its word holds.
        """
        heard = self.settle(what)
        if heard == PAID and Gossip.pay(self._gossip):
            self._gossip.completed()
        return heard

    def follow(self) -> None:
        """Do what the leader does after a reduction."""
        if self.skip(NEXT) == STEPPED:
            self._gossip.stepped()
            self._gossip.completed()

    def part(self, last: int) -> None:
        """Everybody has joined: take what the node's last rank has, and follow nobody any more."""
        if self.leader is not None:
            self._renew(last)
        elif len(self._gossip.session.node_ranks) > 1:
            self._gossip.equalize(last, node_process_set())
        self.leader = None

    @property
    def _name(self) -> str:
        return f"{self._gossip.key}.shadows"

    def _renew(self, root: int) -> None:
        self._gossip.equalize(root, node_process_set())
        self._take_state(root)

    def _take_state(self, root: int) -> None:
        broadcast_state(self._optimizer(), root, node_process_set(), f"{self._name}.state")

    def _told(self, numbers: list[float]) -> list[float]:
        """The leader's numbers."""
        told = torch.tensor(numbers, dtype=torch.float64)
        how: dict[str, Any] = {"inplace": True, "root": self.leader}
        begin("broadcast", [told], self._name, node_process_set(), **how).synchronize()
        return [float(number) for number in told]

    def _set_rates(self, rates: list[float]) -> None:
        if not self.following:
            return
        for group, rate in zip(self._optimizer().param_groups, rates, strict=True):
            if isinstance(group.get("lr"), torch.Tensor):
                group["lr"].fill_(rate)
            elif "lr" in group:
                group["lr"] = rate
