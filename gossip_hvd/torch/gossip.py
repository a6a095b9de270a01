"""One PyTorch optimizer's part in the gossip: what ``optimizer.gossip`` is.

The optimizer stays what it is (its type, its state, its schedulers): gradients are averaged over
the node during backward, and after ``step`` the engine runs the rounds that are due.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import horovod.torch as horovod
import torch

from gossip_hvd import session
from gossip_hvd.agreement import require_agreement
from gossip_hvd.blocks import Segments, blocks_of, layout_of
from gossip_hvd.errors import ConfigError
from gossip_hvd.gossip import Gossip, running
from gossip_hvd.methods import Method
from gossip_hvd.options import EngineOptions
from gossip_hvd.progress import Steps
from gossip_hvd.rounds import MOMENTUM, VARIANCE
from gossip_hvd.segments import Layout
from gossip_hvd.torch.attachment import Attachment, with_it
from gossip_hvd.torch.handles import begin
from gossip_hvd.torch.loss import NodeLoss
from gossip_hvd.torch.memory import TorchMemory, field_of
from gossip_hvd.torch.reduction import Named, NodeReduction, ReductionOptions, weakly
from gossip_hvd.torch.saved import arrays_as, bytes_of
from gossip_hvd.torch.shadows import NEXT, PAID, STEPPED, Shadows

HISTORY = {MOMENTUM: ("momentum_buffer", "exp_avg"), VARIANCE: ("exp_avg_sq",)}
"""Where PyTorch's optimizers keep a payload slot's values."""


class TorchGossip(Gossip):
    """The gossip of one PyTorch optimizer; reached as ``optimizer.gossip``.

    Attributes:
        offered: all names that the user gave, also of parameters that the optimizer may yet get.
        names: the name of every parameter that it trains now.
        shadows: the ranks of this node that are out of data.
    """

    offered: Sequence[Named] = ()

    def __init__(
        self,
        current: session.Session,
        optimizer: torch.optim.Optimizer,
        named: Sequence[Named],
        reduction: ReductionOptions,
        options: EngineOptions,
        method: Method,
        segments: Segments,
    ) -> None:
        facts: dict[str, object] = {
            "reduction": reduction,
            "segments": segments if not callable(segments) else "a function",
            "the number of parameters": len(named),
            "the devices of parameters": _devices(p for _, p in named),
        }
        for name, p in named:
            facts[f"parameter {name!r}"] = f"{tuple(p.shape)} {p.dtype} grad={p.requires_grad}"
        kind = type(optimizer).__name__
        super().__init__(current, method.fitted(kind), options, {"optimizer": kind, **facts})
        self._optimizer = weakref.ref(optimizer)
        self.names = {p: name for name, p in named}
        self._segments = segments
        self._depth, self._skipping = 0, False
        self._polling: dict[int, Any] = {}
        self.shadows = Shadows(self, lambda: self._live())
        self._step = 0
        self._build()
        scale = current.cluster.gradient_scale(current.node)
        process_set, ranks = current.process_sets["torch"], current.node_ranks
        if reduction.op == horovod.Sum:
            # A sum counts ranks by itself; all-reduce then takes the mean of the nodes' sums.
            scale = float(len(current.cluster.nodes)) if method.name == "allreduce" else 1.0
        if self.delegated:
            process_set, scale = horovod.global_process_set, 1.0
            ranks = tuple(range(current.world.size))
        siblings = functools.partial(current.waits_for, ranks)
        self._loss = NodeLoss(f"{self.key}.loss", process_set, siblings)
        self._reduction = NodeReduction(
            named,
            reduction,
            process_set,
            scale,
            self.key,
            siblings,
            self._at_end_of_backward,
            self._at_begin_of_reduction,
        )
        self._attach(optimizer)

    def report_loss(self, loss: float | torch.Tensor) -> None:
        """Tell a method that adapts to it the loss of this step, before ``backward``.

        The mean is taken over the ranks of the node that report one.
        """
        if self.method.needs_loss:
            self._loss.report(loss)

    def trains(self, parameter: torch.Tensor) -> bool:
        """Whether this parameter is gossiped."""
        return parameter in self.names and parameter.requires_grad

    def state_dict(self, *, drain: bool = False) -> dict[str, Any]:
        """See ``Gossip.state_dict``; arrays are tensors, as ``torch.save`` likes them."""
        state: dict[str, Any] = arrays_as(torch.from_numpy, super().state_dict(drain=drain))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Gossip.load_state_dict``."""
        super().load_state_dict(arrays_as(bytes_of, state))

    def unflatten(self) -> None:
        """Give every parameter memory of its own until the next round.

        For libraries that refuse parameters which are views of one buffer, such as safetensors'
        ``save_model`` and ``load_model``.
        """
        self.drain()
        self._memory.detach()

    def adopt(self, parameters: Sequence[torch.Tensor]) -> None:
        """Train parameters that the optimizer has been given later; all ranks alike."""
        names = {id(p): name for name, p in self.offered}
        new = [p for p in parameters if p not in self.names]
        first = len(self.names)
        named = [(names.get(id(p), f"added.{first + i}"), p) for i, p in enumerate(new)]
        _succeed(new)
        # The engine is made anew when the next backward ends, as for parameters unfrozen.
        self.names.update((p, name) for name, p in named)
        self._reduction.add(named)

    def leave(self, ids: set[int]) -> None:
        """Train these parameters no more, since another optimizer does; all ranks must call."""
        self.drain()
        self._memory.detach()
        self._reduction.drop(ids)
        for key in ids & self._polling.keys():
            self._polling.pop(key).remove()
        for parameter in [p for p in self.names if id(p) in ids]:
            del self.names[parameter]
        ended = self.session is not session.current()
        if not ended and any(p.requires_grad for p in self.names):
            self._build()
            return
        self._attachment.remove()
        self.engine.close()

    def pay(self) -> bool:
        """See ``Gossip.pay``; inside a step, which may compute gradients, weights are its own."""
        allowed = self.shadows.paying if self.shadows.led else self._depth == 0
        return allowed and super().pay()

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Within it, backward passes accumulate gradients without averaging them, as in DDP."""
        return self._reduction.paused()

    def follow(self) -> None:
        """Repeat a step of ranks that still have data, with gradients of zero; see ``join``."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        self.shadows.following = True
        try:
            self._reduction.follow()
            if self.shadows.led:
                self.shadows.follow()
            else:
                optimizer.step()
                optimizer.zero_grad()
        finally:
            self.shadows.following = False

    def equalize(self, root: int, members: Any) -> None:
        """Take the weights of one rank; all of its process set must call.

        Args:
            root: its world rank.
            members: the process set.
        """
        begun = [
            begin("broadcast", [p], f"{self.key}.{name}", members, inplace=True, root=root)
            for p, name in self.names.items()
        ]
        for handle in begun:
            handle.synchronize()

    def _on_gradient(self, _: torch.Tensor) -> None:
        self.poll()

    def _at_begin_of_reduction(self) -> None:
        self.shadows.skip(NEXT)
        if self.method.needs_loss:
            self._loss.begin()
        if not self.delegated:  # Those steps are Horovod's to follow, and not all ranks make them.
            self._step = self.session.operations.step(self.key)

    def _at_end_of_backward(self) -> None:
        if self._trained != [p.requires_grad for p in self.names]:
            self._rebuild()
        if not self.delegated:
            paying = self._depth == 0 and self.engine.owed > self.options.staleness
            self.shadows.meet(self._step, paying)
        if self.method.needs_rate:
            self.learn(self._rates())
        if self.method.needs_loss:
            self._hear_loss()
        self.reduced()
        self.shadows.pending = self.shadows.leader is not None

    def _hear_loss(self) -> None:
        loss = self._loss.mean()
        if loss is None and self.engine.loss is None and self.shadows.following:
            loss = math.nan  # A node that has never had data has none to tell.
        if loss is not None:
            self.engine.loss = loss

    def _rates(self) -> list[float]:
        """The learning rate of every field."""
        groups = self._live().param_groups
        by_id = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        by_name = {name: by_id[id(p)] for p, name in self.names.items()}
        return [by_name[field.name] for field in self.layout.fields]

    def _history(self, slot: str, parameter: torch.Tensor) -> torch.Tensor | None:
        """The optimizer's own buffer of a parameter, once there is one."""
        state = self._live().state.get(parameter, {})
        return next((state[name] for name in HISTORY[slot] if state.get(name) is not None), None)

    def _live(self) -> torch.optim.Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None, "its hooks cannot outlive an optimizer"
        return optimizer

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None and "before_step" in self.method.hooks:
            raise ConfigError(
                f"method {self.method.name!r} prepares weights and gradients before the step, so "
                "step(closure) cannot compute gradients inside it: call backward() before step()."
            )
        self._depth += 1
        if self._depth > 1:
            return None
        if closure is None and not self._skipping:
            self._reduction.synchronize()
        self.stepping()
        if not callable(closure):
            return None
        closure = self._settled(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _settled(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of a step; it may compute the rest of a window of passes, or a short one."""
        skipping = self._skipping

        def both() -> Any:
            try:
                loss = closure()
            except BaseException:
                self._depth = 0  # The step is over, and no hook will say so.
                raise
            if not skipping:
                self._reduction.synchronize()
            return loss

        return both

    def _after_step(self, *_: Any) -> None:
        # Wrapper classes whose step calls another class's step fire these hooks twice.
        self._depth -= 1
        if self._depth == 0:
            self._reduction.used()
            self.shadows.settle(STEPPED)
            self.stepped()
            self.completed()

    def _run(self, steps: Steps) -> None:
        self.shadows.settle(PAID)
        super()._run(steps)

    def _build(self) -> None:
        """Make layout, memory and engine for the parameters that want gradients now."""
        trained = [(name, p) for p, name in self.names.items() if p.requires_grad]
        if not trained:
            raise ConfigError("no parameter of this optimizer requires a gradient.")
        layout = _layout(trained, self._segments)
        if not hasattr(self, "engine"):
            _succeed(self.names)
        by_name = dict(trained)
        parameters = [by_name[field.name] for field in layout.fields]
        self._memory = TorchMemory(layout, parameters, self.slots, self._history)
        self.build(layout, self._memory)
        self._trained = [p.requires_grad for p in self.names]
        if self.options.progress == "hooks":
            for parameter in parameters:
                if id(parameter) not in self._polling:
                    hook = parameter.register_post_accumulate_grad_hook(weakly(self._on_gradient))  # type: ignore[no-untyped-call]
                    self._polling[id(parameter)] = hook

    def _rebuild(self) -> None:
        """Start again after parameters were frozen or unfrozen; on all ranks at once."""
        self.drain()
        self._memory.detach()
        require_agreement(
            self.session.world,
            "parameters that require gradients",
            {f"parameter {n!r}": p.requires_grad for p, n in self.names.items()},
        )
        self._build()

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(lambda _: self._reduction.await_passes()),
        )
        attributes = {
            "gossip": self,
            "zero_grad": with_it(optimizer, "zero_grad", before=self._clearing),
            "add_param_group": with_it(optimizer, "add_param_group", after=self._adopt_last),
            # Horovod's names; after all its passes a gradient is complete when backward returns.
            "synchronize": self._reduction.synchronize,
            "skip_synchronize": self._skip,
            "set_backward_passes_per_step": self._reduction.await_passes,
            # Private there, yet Horovod's own tests read it.
            "_parameter_names": self.names,
        }
        on_parameters = (self._polling, self._reduction.hooked, self._reduction.weighing)
        self._attachment = Attachment(optimizer, hooks, attributes, self._number, on_parameters)

    def _clearing(self) -> None:
        if self.pay():
            self.completed()  # Other nodes have not skipped this step, and count it.
        self._reduction.used()

    def _adopt_last(self) -> None:
        self.adopt(self._live().param_groups[-1]["params"])

    @contextlib.contextmanager
    def _skip(self) -> Iterator[None]:
        before, self._skipping = self._skipping, True
        try:
            yield
        finally:
            self._skipping = before


def _succeed(parameters: Iterable[torch.Tensor]) -> None:
    """Take parameters over from optimizers that were wrapped before; on all ranks at once."""
    if not any(running()):
        return
    gc.collect()  # Who is still running must not depend on when each rank's collector came by.
    mine = {id(p) for p in parameters}
    for older in running():
        if isinstance(older, TorchGossip) and (ids := mine & {id(p) for p in older.names}):
            older.leave(ids)


def _devices(parameters: Iterable[torch.Tensor]) -> str:
    """How parameters are spread, whatever a rank's devices are called: ``"0 0 1"`` over two."""
    seen: dict[torch.device, int] = {}
    places = [seen.setdefault(p.device, len(seen)) for p in parameters]
    return " ".join(map(str, places)) if len(seen) > 1 else "one"


def _layout(trained: Sequence[Named], segments: Segments) -> Layout:
    finder = None if trained[0][0].startswith("allreduce.noname") else blocks_of
    return layout_of([field_of(name, p) for name, p in trained], segments, finder)
