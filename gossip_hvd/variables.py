"""The gossip of a list of variables, for frameworks whose optimizers are told of gradients.

PyTorch's own optimizers are followed through hooks on parameters. Keras and TensorFlow hand over a
list of gradients and a list of variables instead, now at once, now while a graph is being traced;
what they have in common is here, and what differs is in a ``Framework``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gossip_hvd.agreement import require_agreement
from gossip_hvd.blocks import BlockFinder, Segments, layout_of
from gossip_hvd.errors import ConfigError
from gossip_hvd.gossip import Gossip, running
from gossip_hvd.memory import Memory
from gossip_hvd.methods import Method
from gossip_hvd.options import EngineOptions
from gossip_hvd.rounds import GRADIENTS, WEIGHTS
from gossip_hvd.segments import Field
from gossip_hvd.session import Session

Action = Callable[..., None]
"""What runs between two parts of a training step; it is given the values of some tensors."""


@dataclass(frozen=True)
class NodeAverage:
    """How gradients are averaged over a node: Horovod's own arguments.

    Attributes:
        compression: Horovod's, of gradients on the way.
        op: Horovod's ``Average`` or ``Sum``.
        predivide: ``gradient_predivide_factor``.
        sparse_as_dense: whether to turn sparse gradients into dense ones.
        groups: reduce gradients in so many groups, 0 for each on its own; or in these: the keys
            of variables, or, while gradients are averaged, positions.
        factor: what every averaged gradient is multiplied by.
        process_set: the node's; None where there is nobody to reduce with.
        prefix: of the operations' names; equal on all ranks, different for every model.
    """

    compression: Any
    op: Any
    predivide: float = 1.0
    sparse_as_dense: bool = False
    groups: int | tuple[tuple[Any, ...], ...] = 0
    factor: float = 1.0
    process_set: Any = field(default=None, compare=False)
    prefix: str = field(default="", compare=False)


class Framework(Protocol):
    """What differs between TensorFlow and PyTorch beneath Keras."""

    name: str
    hvd: Any

    def untraced(self, function: Action) -> Action:
        """The function, left alone by compilers that cannot see past it."""

    def key(self, variable: Any) -> object:
        """What identifies a variable."""

    def field(self, name: str, variable: Any) -> Field:
        """The variable's place in a flat buffer."""

    def memory(self, layout: Any, variables: Mapping[str, Sequence[Any]]) -> Memory:
        """The flat bytes of each slot; variables are in the layout's order, None where absent."""

    def filled(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Sequence[Any]:
        """The gradients, zero where another rank may have one and this rank has none."""

    def average(self, gradients: Sequence[Any], how: NodeAverage) -> list[Any]:
        """The gradients averaged over the node."""

    def average_number(self, number: Any, how: NodeAverage) -> Any:
        """One number averaged over the node."""

    def run(
        self,
        memory: Memory,
        slots: Sequence[str],
        action: Action,
        numbers: Sequence[Any] = (),
        gradients: Mapping[int, Any] | None = None,
    ) -> dict[int, Any]:
        """Call ``action`` with the numbers' values, now or when the graph comes to this point.

        Args:
            memory: from ``memory``; in step with its tensors while the action runs.
            slots: the slots that the action may read or change.
            action: what to do.
            numbers: scalar tensors whose values the action is given.
            gradients: the slot of that name, by position in the layout.

        Returns:
            The gradients, as the action has left them.
        """


class VariablesGossip(Gossip):
    """The gossip of one optimizer's or one tape's variables.

    Args:
        current: the running session.
        framework: of the variables.
        method: how the nodes train together.
        options: of the engine.
        segments: how to cut the model.
        how: to average gradients over the node; process set and prefix are filled in here.
        owner: what tells of gradients: ``"optimizer"`` or ``"tape"``.

    Attributes:
        framework: as given.
        how: as it is done.
        seconds: spent so far in the rounds, waiting included, on the path of the training step.
    """

    def __init__(
        self,
        current: Session,
        framework: Framework,
        method: Method,
        options: EngineOptions,
        segments: Segments,
        how: NodeAverage,
        owner: str = "optimizer",
    ) -> None:
        groups = how.groups if isinstance(how.groups, int) else [len(g) for g in how.groups]
        facts = {
            "gradient reduction": replace(how, groups=0),
            "groups": groups,
            "segments": segments if not callable(segments) else "a function",
            "framework": framework.name,
        }
        super().__init__(current, method, options, facts)
        self.framework, self._segments, self._owner = framework, segments, owner
        self.seconds = 0.0
        process_set = current.process_sets[framework.name]
        factor = current.cluster.gradient_scale(current.node)
        if self.delegated:
            everybody = framework.hvd.global_process_set
            process_set, factor = everybody if current.world.size > 1 else None, 1.0
        self.how = replace(
            how,
            factor=how.factor * factor,
            process_set=process_set,
            prefix=self.key.replace(".", "_"),
        )
        self._places: dict[object, int] = {}
        self._memory: Memory | None = None

    @property
    def begun(self) -> bool:
        """Whether the variables are known."""
        return self._memory is not None

    @property
    def active(self) -> bool:
        """Whether there is anything to do beside what Horovod does."""
        return self.begun and not self.delegated and not self.engine.alone

    def trains(self, variable: Any) -> bool:
        """Whether this variable is gossiped."""
        return self.framework.key(variable) in self._places

    def begin(
        self,
        named: Sequence[tuple[str, Any]],
        finder: BlockFinder | None,
        history: Mapping[str, Mapping[object, Any]] | None = None,
    ) -> None:
        """Build memory and engine for variables; all ranks must call.

        Args:
            named: every variable with its name, in the model's order.
            finder: finds the model's blocks from the names; None where they say nothing.
            history: the optimizer's buffers for payload slots, by slot and variable's key.

        Raises:
            ConfigError: where ranks differ, or there is nothing to train.
        """
        if not named:
            raise ConfigError("this optimizer has no variables to train.")
        for other in running():
            if isinstance(other, VariablesGossip) and any(other.trains(v) for _, v in named):
                if other._owner != self._owner:
                    raise ConfigError(
                        "DistributedGradientTape and DistributedOptimizer train the same "
                        "variables: gradients would be averaged twice. Use one of them."
                    )
                # An optimizer that trained them before: its exchange may still be in flight.
                other.drain()
        unique = _unique([name for name, _ in named])
        fields = [self.framework.field(n, v) for n, (_, v) in zip(unique, named, strict=True)]
        layout = layout_of(fields, self._segments, finder)
        facts: dict[str, object] = {"the number of variables": len(named)}
        # Names are not compared: Keras numbers them by what a process has built before.
        for i, (each, (_, v)) in enumerate(zip(fields, named, strict=True)):
            facts[f"variable {i}"] = f"{tuple(v.shape)} {each.dtype}"
        facts["segments"] = [(span.start, span.stop) for span in layout.segments]
        require_agreement(self.session.world, "the optimizer's variables", facts)
        by_name = dict(zip(unique, (v for _, v in named), strict=True))
        ordered = [by_name[each.name] for each in layout.fields]
        self._places = {self.framework.key(v): i for i, v in enumerate(ordered)}
        tensors: dict[str, Sequence[Any]] = {WEIGHTS: ordered}
        for slot in self.slots:
            found = (history or {}).get(slot, {})
            tensors.setdefault(slot, [found.get(self.framework.key(v)) for v in ordered])
        self._memory = self.framework.memory(layout, tensors)
        self.build(layout, self._memory)

    # Parts of a training step; each may be traced into a graph -------------------------------

    def average(self, gradients: Sequence[Any], variables: Sequence[Any], *rate: Any) -> list[Any]:
        """The gradients, averaged as the method wants them before the local step.

        Args:
            gradients: of ``variables``.
            variables: all of those that are trained, or some.
            rate: the learning rate of the step, where it is known.
        """
        averaged = self.framework.average(gradients, self._grouped(variables))
        if not self._acts_before:
            return averaged
        assert self._memory is not None
        slots = self._used if self.method.hooks else (GRADIENTS,)
        places = [self._places[self.framework.key(v)] for v in variables]
        given = dict(zip(places, averaged, strict=True)) if GRADIENTS in self._used else {}
        changed = self.framework.run(self._memory, slots, self._before_step, rate, given)
        return [changed.get(place, g) for place, g in zip(places, averaged, strict=True)]

    def exchange(self, *numbers: Any) -> None:
        """After the local step: the round that is due.

        Args:
            numbers: the learning rate, and the loss of the step where it is known.
        """
        slots = tuple(slot for slot in self._used if slot != GRADIENTS)
        if self.active and slots:
            assert self._memory is not None
            self.framework.run(self._memory, slots, self._after_step, numbers)

    def _grouped(self, variables: Sequence[Any]) -> NodeAverage:
        """How to average gradients of these variables, groups as positions."""
        if isinstance(self.how.groups, int):
            return self.how
        place = {self.framework.key(v): i for i, v in enumerate(variables)}
        groups = (tuple(place[k] for k in group if k in place) for group in self.how.groups)
        return replace(self.how, groups=tuple(group for group in groups if group))

    def _before_step(self, *rate: float) -> None:
        started = time.monotonic()
        self._learn(*rate)
        self.reduced()
        self.stepping()
        self.seconds += time.monotonic() - started

    def _after_step(self, *numbers: float) -> None:
        started = time.monotonic()
        self._learn(*numbers)
        if not self._acts_before:
            self.reduced()
        self.stepped()
        self.seconds += time.monotonic() - started

    def _learn(self, rate: float | None = None, loss: float | None = None) -> None:
        if rate is not None:
            self.engine.learn(float(rate))
        if loss is not None:
            self.engine.loss = float(loss)

    @property
    def _acts_before(self) -> bool:
        """Whether the method does something between the gradients and the local step."""
        return self.active and (bool(self.method.hooks) or GRADIENTS in self._used)

    @property
    def _used(self) -> tuple[str, ...]:
        """The slots that the method's rounds read or write."""
        return tuple(dict.fromkeys((*self.method.writes, *self.method.reads)))


def _unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where several are the same."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique
