"""``DistributedOptimizer``: hooks on an ordinary optimizer that average and gossip.

The optimizer stays what it is (its type, its state, its schedulers): gradients are averaged over
the node during backward, and after ``step`` the engine runs the rounds that are due.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import horovod.torch as horovod
import torch

from gossip_hvd import session
from gossip_hvd.agreement import require_agreement
from gossip_hvd.blocks import Segments, blocks_of, layout_of
from gossip_hvd.errors import ConfigError
from gossip_hvd.gossip import Gossip, running
from gossip_hvd.methods import Method, method_of
from gossip_hvd.options import EngineOptions
from gossip_hvd.rounds import MOMENTUM, VARIANCE
from gossip_hvd.segments import Layout
from gossip_hvd.settings import setting
from gossip_hvd.torch.arguments import groups_of, named_of, refuse_searches
from gossip_hvd.torch.attachment import Attachment, with_it
from gossip_hvd.torch.handles import begin, watched
from gossip_hvd.torch.memory import TorchMemory, field_of
from gossip_hvd.torch.process_sets import is_world
from gossip_hvd.torch.reduction import Named, NodeReduction, ReductionOptions, weakly
from gossip_hvd.torch.saved import arrays_as, bytes_of

HISTORY = {MOMENTUM: ("momentum_buffer", "exp_avg"), VARIANCE: ("exp_avg_sq",)}
"""Where PyTorch's optimizers keep a payload slot's values."""


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[Named] | None = None,
    compression: Any = horovod.Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = horovod.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    method: str | Method | None = None,
    segments: Segments = "blocks",
    **options: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer train together with all other ranks; returns the same optimizer.

    Another one that trained the same parameters until now trains them no more: with none left it
    is a plain optimizer again.

    Args:
        optimizer: any optimizer of PyTorch's; ``optimizer.gossip`` is added to it.
        named_parameters: usually ``model.named_parameters()``; names segments and errors.
        compression: of gradients inside the node, as Horovod's.
        backward_passes_per_step: backward passes that accumulate before a reduction.
        op: ``Average`` or ``Sum`` inside the node.
        gradient_predivide_factor: splits the averaging before and after the sum, as Horovod's.
        num_groups: reduce gradients in so many groups, as Horovod's.
        groups: or in these groups, a number or lists of parameters.
        sparse_as_dense: turn sparse gradients into dense ones.
        process_set: Horovod's argument; only the global set makes sense here.
        method: ``"crossover"`` (the default), ``"gossip"``, ``"allreduce"`` or a ``Method``;
            else ``GOSSIP_HVD_METHOD``.
        segments: ``"blocks"`` (the model's own), ``"one"``, a number of equally large ones, a
            function from a parameter's name to its segment's, or lists of names by segment.
        options: of the engine (``seed``, ``timing``, ``staleness``, ``wire_dtype``,
            ``chunk_bytes``) and of the method (``peers``, ``topology``, …).

    Raises:
        ConfigError: for unknown names and options, settings that differ between ranks.
        ValueError: for names that Horovod refuses too.
    """
    current = session.current()
    if not is_world(process_set):
        raise ConfigError(
            "process_set: gradients are averaged over this rank's node; choose nodes with "
            "init(node_size=…) instead."
        )
    if "gossip" in vars(optimizer):
        raise ConfigError("this optimizer is distributed already: wrap it once.")
    if op not in (horovod.Average, horovod.Sum):
        raise ConfigError(f"op={op}: gradients of a node are combined by Average or Sum.")
    if gradient_predivide_factor != 1.0 and op != horovod.Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if num_groups != 0:
        warnings.warn(
            "Parameter `num_groups` has been replaced by `groups`.",
            DeprecationWarning,
            stacklevel=2,
        )
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    offered = None if named_parameters is None else list(named_parameters)
    named = named_of(optimizer, offered)
    reduction = ReductionOptions(
        compression,
        backward_passes_per_step,
        op,
        gradient_predivide_factor,
        sparse_as_dense,
        groups_of(named, num_groups, groups),
    )
    engine_options = EngineOptions.take(options)
    chosen = method_of(setting("METHOD", method), EngineOptions.names(), **options)
    refuse_searches(optimizer, chosen, current.scope, len(current.cluster.nodes))
    gossip = TorchGossip(current, optimizer, named, reduction, engine_options, chosen, segments)
    gossip.offered = offered or []
    return optimizer


class TorchGossip(Gossip):
    """The gossip of one PyTorch optimizer; reached as ``optimizer.gossip``.

    Attributes:
        offered: all names that the user gave, also of parameters that the optimizer may yet get.
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
            "the version of torch": torch.__version__,
            "the number of parameters": len(named),
        }
        for name, p in named:
            facts[f"parameter {name!r}"] = f"{tuple(p.shape)} {p.dtype} grad={p.requires_grad}"
        kind = type(optimizer).__name__
        super().__init__(current, method.fitted(kind), options, {"optimizer": kind, **facts})
        self._optimizer = weakref.ref(optimizer)
        self._named, self._segments = list(named), segments
        self._depth, self._skipping = 0, False
        self._polling: dict[int, Any] = {}
        self._build()
        scale = current.cluster.gradient_scale(current.node)
        process_set, ranks = current.process_sets["torch"], current.node_ranks
        if reduction.op == horovod.Sum:
            # A sum counts ranks by itself; all-reduce then takes the mean of the nodes' sums.
            scale = float(len(current.cluster.nodes)) if method.name == "allreduce" else 1.0
        if self.delegated:
            process_set, scale = horovod.global_process_set, 1.0
            ranks = tuple(range(current.world.size))
        self._reduction = NodeReduction(
            named,
            reduction,
            process_set,
            scale,
            self.key,
            functools.partial(current.waits_for, ranks),
            self._at_end_of_backward,
            self._at_begin_of_reduction,
        )
        self._attach(optimizer)

    def report_loss(self, loss: float | torch.Tensor) -> None:
        """Tell a method that adapts to it the loss of this step, before ``backward``.

        The mean over the node is taken, so all ranks of a node must call.
        """
        if not self.method.needs_loss:
            return
        value = torch.as_tensor(loss, dtype=torch.float64).detach().to("cpu", copy=True)
        process_set = self.session.process_sets["torch"]
        if process_set is not None:
            name = f"{self.key}.loss"
            handle = horovod.allreduce_async(value, name=name, process_set=process_set)
            ranks = self.session.node_ranks
            value = watched(handle, lambda: self.session.waits_for(ranks, "report_loss"))
        self.engine.loss = float(value)

    def trains(self, parameter: torch.Tensor) -> bool:
        """Whether this parameter is gossiped."""
        return any(p is parameter and p.requires_grad for _, p in self._named)

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
        known = {id(p) for _, p in self._named}
        names = {id(p): name for name, p in self.offered}
        new = [p for p in parameters if id(p) not in known]
        first = len(self._named)
        named = [(names.get(id(p), f"added.{first + i}"), p) for i, p in enumerate(new)]
        # The engine is made anew when the next backward ends, as for parameters unfrozen.
        self._named += named
        self._reduction.add(named)

    def leave(self, ids: set[int]) -> None:
        """Train these parameters no more, since another optimizer does; all ranks must call."""
        self.drain()
        self._memory.detach()
        self._reduction.drop(ids)
        for key in ids & self._polling.keys():
            self._polling.pop(key).remove()
        self._named = [(name, p) for name, p in self._named if id(p) not in ids]
        ended = self.session is not session.current()
        if not ended and any(p.requires_grad for _, p in self._named):
            self._build()
            return
        self._attachment.remove()
        self.engine.close()

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Within it, backward passes accumulate gradients without averaging them, as in DDP."""
        return self._reduction.paused()

    def follow(self) -> None:
        """Repeat a step of ranks that still have data, with gradients of zero; see ``join``."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._reduction.follow()
            optimizer.step()
            optimizer.zero_grad()

    def equalize(self, root: int, members: Any) -> None:
        """Take the weights of one rank; all of its process set must call.

        Args:
            root: its world rank.
            members: the process set.
        """
        begun = [
            begin("broadcast", [p], f"{self.key}.{name}", members, inplace=True, root=root)
            for name, p in self._named
        ]
        for handle in begun:
            handle.synchronize()

    def _on_gradient(self, _: torch.Tensor) -> None:
        self.poll()

    def _at_begin_of_reduction(self) -> None:
        if not self.delegated:  # Those steps are Horovod's to follow, and not all ranks make them.
            self.session.operations.step(self.key)

    def _at_end_of_backward(self) -> None:
        if self._trained != [p.requires_grad for _, p in self._named]:
            self._rebuild()
        if self.method.needs_rate:
            self.learn(self._rates())
        self.reduced()

    def _rates(self) -> list[float]:
        """The learning rate of every field."""
        groups = self._live().param_groups
        by_id = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        by_name = {name: by_id[id(p)] for name, p in self._named}
        return [by_name[field.name] for field in self.layout.fields]

    def _history(self, slot: str, parameter: torch.Tensor) -> torch.Tensor | None:
        """The optimizer's own buffer of a parameter, once there is one."""
        state = self._live().state.get(parameter, {})
        return next((state[name] for name in HISTORY[slot] if state.get(name) is not None), None)

    def _live(self) -> torch.optim.Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None, "its hooks cannot outlive an optimizer"
        return optimizer

    def _before_step(self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None and "before_step" in self.method.hooks:
            raise ConfigError(
                f"method {self.method.name!r} prepares weights and gradients before the step, so "
                "step(closure) cannot compute gradients inside it: call backward() before step()."
            )
        if self._depth == 0 and not self._skipping:
            self._reduction.synchronize()
        self._depth += 1
        if self._depth == 1:
            self.stepping()

    def _after_step(self, *_: Any) -> None:
        # Wrapper classes whose step calls another class's step fire these hooks twice.
        self._depth -= 1
        if self._depth == 0:
            self._reduction.used()
            self.stepped()
            self.completed()

    def _build(self) -> None:
        """Make layout, memory and engine for the parameters that want gradients now."""
        trained = [(name, p) for name, p in self._named if p.requires_grad]
        if not trained:
            raise ConfigError("no parameter of this optimizer requires a gradient.")
        layout = _layout(trained, self._segments)
        if not hasattr(self, "engine"):
            _succeed(self._named)
        by_name = dict(trained)
        parameters = [by_name[field.name] for field in layout.fields]
        self._memory = TorchMemory(layout, parameters, self.slots, self._history)
        self.build(layout, self._memory)
        self._trained = [p.requires_grad for _, p in self._named]
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
            {f"parameter {n!r}": p.requires_grad for n, p in self._named},
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


def _succeed(named: Sequence[Named]) -> None:
    """Take parameters over from optimizers that were wrapped before; on all ranks at once."""
    if not any(running()):
        return
    gc.collect()  # Who is still running must not depend on when each rank's collector came by.
    mine = {id(p) for _, p in named}
    for older in running():
        if isinstance(older, TorchGossip) and (ids := mine & {id(p) for _, p in older._named}):
            older.leave(ids)


def _layout(trained: Sequence[Named], segments: Segments) -> Layout:
    finder = None if trained[0][0].startswith("allreduce.noname") else blocks_of
    return layout_of([field_of(name, p) for name, p in trained], segments, finder)
