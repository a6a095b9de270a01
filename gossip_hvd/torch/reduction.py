"""Average a node's gradients with Horovod while backward runs, and say when that is complete."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import horovod.torch as hvd
import torch
from torch.autograd import Variable

from gossip_hvd.errors import ConfigError
from gossip_hvd.torch import sparse
from gossip_hvd.torch.handles import watched
from gossip_hvd.waits import Facts

Named = tuple[str, torch.Tensor]
NATIVE = {torch.float16, torch.float32, torch.float64}
PAUSED = sys.maxsize
"""So many backward passes nobody makes."""

BUNDLE = 1 << 20
"""Bytes of neighbouring gradients that one operation reduces: each operation costs a hook's time
and Horovod's, and a large one would start late."""


@dataclass(frozen=True)
class ReductionOptions:
    """Horovod's own arguments, with Horovod's meaning, inside the node."""

    compression: Any = hvd.Compression.none
    backward_passes_per_step: int = 1
    op: Any = hvd.Average
    gradient_predivide_factor: float = 1.0
    sparse_as_dense: bool = False
    groups: tuple[tuple[str, ...], ...] = ()


@dataclass
class _Bundle:
    """Parameters whose gradients are reduced by one Horovod operation.

    Attributes:
        asked: whether the user wants just these together.
        launched: while it is under way, what each operation reduces.
    """

    members: list[Named]
    asked: bool = False
    ready: set[int] = field(default_factory=set)
    launched: list[_Launched] = field(default_factory=list)


@dataclass
class _Launched:
    """One operation under way.

    Attributes:
        handles: Horovod's; indices and values of a sparse gradient have one each, and a node of
            one rank has none.
        members: whose gradients it reduces.
        prepared: of each, what is reduced in place and how it was compressed.
    """

    handles: tuple[Any, ...]
    members: list[Named]
    prepared: list[tuple[torch.Tensor, Any]]


class NodeReduction:
    """Hooks on parameters that reduce gradients as they appear.

    Args:
        named: every parameter with a name unique in the model, equal on all ranks.
        options: Horovod's.
        process_set: the node's; None for a node of one rank, which has nothing to reduce.
        scale: what every gradient is multiplied by, as it is computed (see
            ``Cluster.gradient_scale``).
        prefix: makes operation names unique among optimizers.
        siblings: says in a wait who waits for whom, and for what.
        completed: called at the end of each backward that completed a reduction.
        begun: called when this rank's part of a reduction is under way, before any wait.

    Attributes:
        passes: backward passes that a reduction waits for.
        hooked: by parameter, the handle of the hook that reduces its gradient.
        weighing: by parameter, the handle of the hook that scales its gradient.
    """

    def __init__(
        self,
        named: Sequence[Named],
        options: ReductionOptions,
        process_set: Any,
        scale: float,
        prefix: str,
        siblings: Callable[[str], Facts],
        completed: Callable[[], None],
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        self.options, self._process_set, self._scale = options, process_set, scale
        factor = options.gradient_predivide_factor if options.op == hvd.Average else 1.0
        self._arguments = {
            "op": options.op,
            "prescale_factor": 1.0 / factor,
            "postscale_factor": factor,
            "process_set": process_set,
        }
        self._siblings = siblings
        self._reduced: dict[int, torch.Tensor] = {}
        self.passes = options.backward_passes_per_step
        self._prefix, self._completed, self._begun = prefix, completed, begun
        self._bundles = _bundles(named, options.groups)
        self._bundle_of = {id(p): b for b in self._bundles for _, p in b.members}
        self._unhooked = [p for _, p in named]
        self.hooked: dict[int, Any] = {}
        self.weighing: dict[int, Any] = {}
        self._done_passes = 0
        self._sparse: dict[int, int] = {}  # by parameter, the sparse dimensions of its gradient
        self._ending: Callable[[], object | None] = lambda: None
        self.hook_new()

    def add(self, named: Sequence[Named]) -> None:
        """Reduce the gradients of these parameters too, from now on."""
        for entry in named:
            bundle = _Bundle([entry])
            self._bundles.append(bundle)
            self._bundle_of[id(entry[1])] = bundle
            self._unhooked.append(entry[1])
        self.hook_new()

    def hook_new(self) -> None:
        """Hook parameters that want gradients and have no hook yet; cheap to call often."""
        for parameter in self._unhooked:
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(weakly(self._on_gradient))  # type: ignore[no-untyped-call]
                self.hooked[id(parameter)] = hook
                if self._scale != 1.0:
                    # Each new gradient once: what was reduced before may still be in ``grad``.
                    weigh = parameter.register_hook(functools.partial(torch.mul, other=self._scale))  # type: ignore[no-untyped-call]
                    self.weighing[id(parameter)] = weigh
        self._unhooked = [p for p in self._unhooked if id(p) not in self.hooked]

    def drop(self, ids: set[int]) -> None:
        """Leave these parameters alone from now on."""
        self._forget()
        for bundle in self._bundles:
            bundle.members = [(n, p) for n, p in bundle.members if id(p) not in ids]
        self._bundles = [bundle for bundle in self._bundles if bundle.members]
        self._unhooked = [p for p in self._unhooked if id(p) not in ids]
        for hooks in (self.hooked, self.weighing):
            for key in ids & hooks.keys():
                hooks.pop(key).remove()

    def await_passes(self, passes: int | None = None) -> None:
        """Count backward passes from 0 again; up to another number, where one is given."""
        self.passes, self._done_passes = passes or self.passes, 0

    def synchronize(self) -> None:
        """Reduce what fewer passes than ``passes`` have accumulated, as Horovod's does.

        For a step behind the last, shorter window of an epoch. Nothing is rescaled.
        """
        if 0 < self._done_passes < self.passes != PAUSED:
            self._reduce()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward passes inside accumulate gradients and count for nothing else."""
        passes, done = self.passes, self._done_passes
        self.passes = PAUSED
        try:
            yield
        finally:
            self.passes, self._done_passes = passes, done

    def used(self) -> None:
        """The optimizer has stepped or cleared its gradients."""
        self._reduced.clear()

    def follow(self) -> None:
        """Take part in one reduction without data: with gradients of zero."""
        for bundle in self._bundles:
            for _, parameter in bundle.members:
                if parameter.requires_grad:
                    parameter.grad = self._zeros(parameter)
        self._done_passes = self.passes - 1
        self._at_end_of_backward()

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        if self._ending() is None:
            # Runs once all gradients of this backward exist, as in PyTorch's own DDP. It belongs
            # to the backward: where that raises it is gone, and what had begun is forgotten. A
            # backward inside this one (re-entrant checkpoints) finds it alive.
            self._forget()
            ending = functools.partial(self._at_end_of_backward)
            self._ending = weakref.ref(ending)
            Variable._execution_engine.queue_callback(ending)
        if self._done_passes + 1 < self.passes:
            return
        bundle = self._bundle_of[id(parameter)]
        bundle.ready.add(id(parameter))
        if len(bundle.ready) == len(bundle.members) and not bundle.launched:
            self._launch(bundle)

    def _forget(self) -> None:
        """Drop what a backward that raised has left behind."""
        for launched in self._taken():
            self._wait(launched)

    def _at_end_of_backward(self) -> None:
        self._ending = lambda: None
        self._done_passes += 1
        if self._done_passes >= self.passes:
            self._reduce()

    def _reduce(self) -> None:
        """Reduce every gradient, those under way included, and wait."""
        self._done_passes = 0
        self.hook_new()
        for bundle in self._bundles:
            if not bundle.launched and any(p.requires_grad for _, p in bundle.members):
                self._launch(bundle)
        self._begun()
        for launched in self._taken():
            self._finish(launched)
        self._completed()

    def _taken(self) -> Iterator[_Launched]:
        """What is under way, forgotten one by one: a wait that raises is not tried again."""
        for bundle in self._bundles:
            bundle.ready.clear()
            while bundle.launched:
                yield bundle.launched.pop(0)

    def _launch(self, bundle: _Bundle) -> None:
        """Start to reduce; a gradient that this rank did not compute counts as zero."""
        members = [(n, p) for n, p in bundle.members if p.requires_grad]
        prepared = [self._prepare(*member) for member in members]
        if any(tensor.is_sparse for tensor, _ in prepared):
            parts = [([member], [one]) for member, one in zip(members, prepared, strict=True)]
        else:
            parts = [(members, prepared)]
        for part in parts:
            bundle.launched.append(_Launched(self._begin(*part), *part))

    def _begin(
        self, members: list[Named], prepared: list[tuple[torch.Tensor, Any]]
    ) -> tuple[Any, ...]:
        """Hand gradients to Horovod; returns its handles."""
        if self._process_set is None:
            return ()
        name, tensor = f"{self._prefix}.{members[0][0]}", prepared[0][0]
        if tensor.is_sparse:
            return sparse.begin(tensor, name, self._process_set)
        if len(prepared) == 1:
            return (hvd.allreduce_async_(tensor, name=name, **self._arguments),)
        tensors = [tensor for tensor, _ in prepared]
        return (hvd.grouped_allreduce_async_(tensors, name=name, **self._arguments),)

    def _prepare(self, name: str, parameter: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """What Horovod reduces in place for one gradient."""
        gradient = parameter.grad
        if gradient is None:
            gradient = parameter.grad = self._zeros(parameter)
        if self._reduced.get(id(parameter)) is gradient:
            raise ConfigError(
                f"the gradient of {name!r} was summed already and has grown since: a second sum "
                "would count its first part twice. Pass backward_passes_per_step to "
                "DistributedOptimizer to accumulate several passes."
            )
        if gradient.is_sparse:
            self._sparse[id(parameter)] = gradient.sparse_dim()
        if gradient.is_sparse and self.options.sparse_as_dense:
            gradient = parameter.grad = gradient.to_dense()
        elif gradient.is_sparse:
            bundle = self._bundle_of[id(parameter)]
            if bundle.asked and len(bundle.members) > 1:
                raise ValueError(
                    f"the gradient of {name!r} is sparse, which a group cannot hold: leave it out "
                    "of groups, or pass sparse_as_dense=True to DistributedOptimizer."
                )
            return gradient, None
        if self._process_set is None:
            return gradient, None
        tensor = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        if tensor.dtype not in NATIVE:  # Horovod has no bfloat16
            tensor = tensor.float()
        compressed, context = self.options.compression.compress(tensor)
        return compressed.contiguous(), context

    def _finish(self, launched: _Launched) -> None:
        results = self._wait(launched)
        for (_, parameter), (tensor, context) in zip(
            launched.members, launched.prepared, strict=True
        ):
            gradient: Any = parameter.grad
            if launched.handles and tensor.is_sparse:
                indices, values = results
                divisor = self._process_set.size() if self.options.op == hvd.Average else 1
                gradient = parameter.grad = sparse.added(indices, values, divisor, parameter)
            elif launched.handles and tensor is not gradient:
                target = torch.view_as_real(gradient) if gradient.is_complex() else gradient
                result = self.options.compression.decompress(tensor, context)
                if result.data_ptr() != target.data_ptr():
                    target.copy_(result)
            dims = self._sparse.get(id(parameter))
            if dims is not None and not gradient.is_sparse:
                # The optimizer may know no other kind.
                gradient = parameter.grad = gradient.to_sparse(dims)
            if self.options.op == hvd.Sum:
                self._reduced[id(parameter)] = gradient

    def _zeros(self, parameter: torch.Tensor) -> torch.Tensor:
        """A gradient of zero, of the kind that the others have."""
        dims = self._sparse.get(id(parameter))
        if dims is None or self.options.sparse_as_dense:
            return torch.zeros_like(parameter)
        return sparse.nothing(parameter, dims)

    def _wait(self, launched: _Launched) -> list[Any]:
        """What the handles give."""
        facts = functools.partial(self._facts, launched)
        return [watched(handle, facts) for handle in launched.handles]

    def _facts(self, launched: _Launched) -> Facts:
        """Who waits for whom; asked for only where there is something to wait for."""
        first, last = launched.members[0][0], launched.members[-1][0]
        which = f" of {first!r}" if first == last else f"s of {first!r} to {last!r}"
        return self._siblings(f"average the gradient{which}")


def weakly(method: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """A hook that does not keep its object alive.

    PyTorch keeps hooks of a parameter where Python's collector cannot see them, so one that held
    its object, which holds the parameter, would keep both for ever.
    """
    weak, function = weakref.ref(method.__self__), method.__func__  # type: ignore[attr-defined]

    def hook(parameter: torch.Tensor) -> None:
        if (alive := weak()) is not None:
            function(alive, parameter)

    return hook


def _bundles(named: Sequence[Named], groups: Sequence[Sequence[str]]) -> list[_Bundle]:
    """The user's groups, and all other parameters by neighbours of one dtype and device.

    Frozen ones by themselves: they would hold the others back.
    """
    by_name = dict(named)
    bundles = [_Bundle([(name, by_name[name]) for name in group], True) for group in groups]
    grouped = {name for group in groups for name in group}
    kind: object = None
    room = 0
    for name, parameter in sorted(named, key=lambda one: not one[1].requires_grad):
        if name in grouped:
            continue
        before, kind = kind, (parameter.dtype, parameter.device, parameter.requires_grad)
        room -= parameter.nbytes
        if room < 0 or kind != before:
            bundles.append(_Bundle([]))
            room = BUNDLE - parameter.nbytes
        bundles[-1].members.append((name, parameter))
    return bundles
