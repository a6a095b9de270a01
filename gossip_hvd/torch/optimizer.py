"""``DistributedOptimizer``: hooks on an ordinary optimizer that average and gossip.

The optimizer stays what it is (its type, its state, its schedulers): gradients are averaged over
the node during backward, and after ``step`` the engine runs the rounds that are due.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

import horovod.torch as horovod
from gossip_hvd import session
from gossip_hvd.agreement import require_agreement
from gossip_hvd.engine import Engine
from gossip_hvd.errors import ConfigError
from gossip_hvd.flight import Seat
from gossip_hvd.methods import Method, method_of
from gossip_hvd.options import EngineOptions
from gossip_hvd.progress import Steps, ThreadProgress, drive
from gossip_hvd.rounds import WEIGHTS
from gossip_hvd.segments import Layout
from gossip_hvd.settings import setting
from gossip_hvd.torch.blocks import blocks_by, blocks_of
from gossip_hvd.torch.memory import TorchMemory, field_of
from gossip_hvd.torch.reduction import Named, NodeReduction, ReductionOptions

Segments = str | int | Callable[[str], str] | Mapping[str, Sequence[str]]
UNNAMED_SEGMENTS = 16

_counter = itertools.count()
_running: weakref.WeakSet[Gossip] = weakref.WeakSet()


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
    if process_set is not None and process_set is not horovod.global_process_set:
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
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    named = _named(optimizer, named_parameters)
    reduction = ReductionOptions(
        compression,
        backward_passes_per_step,
        op,
        gradient_predivide_factor,
        sparse_as_dense,
        _groups(named, num_groups, groups),
    )
    engine_options = EngineOptions.take(options)
    chosen = method_of(setting("METHOD", method), **options)
    Gossip(current, optimizer, named, reduction, engine_options, chosen, segments)
    return optimizer


class Gossip:
    """What a distributed optimizer does beside stepping; reached as ``optimizer.gossip``.

    Attributes:
        method: how the nodes train together.
        options: of the engine.
    """

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
        self._session, self._optimizer = current, weakref.ref(optimizer)
        self._named, self._segments = list(named), segments
        self.method, self.options = method, options
        self._limit = current.world.limit
        self._depth = 0
        self._key = f"gossip_hvd.{next(_counter)}"
        self._agree(reduction)
        self._wire = current.world.wire()
        self._build()
        scale = current.cluster.gradient_scale(current.node)
        process_set = current.process_sets["torch"]
        if self._delegated:
            process_set, scale = horovod.global_process_set, 1.0
        self._reduction = NodeReduction(
            named, reduction, process_set, scale, self._key, self._reduced
        )
        self._attach(optimizer)
        _running.add(self)
        current.closers.append(self._close)

    # What users call -------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Rounds of gossip posted so far."""
        return self.engine.number

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent so far to other nodes and to its siblings."""
        return self.engine.seat.record.bytes_sent

    @property
    def layout(self) -> Layout:
        """Where parameters lie in the flat buffer and how it is cut into segments."""
        return self.engine.seat.layout

    def report_loss(self, loss: float | torch.Tensor) -> None:
        """Tell methods that adapt to it the loss of this step."""
        self.engine.loss = float(loss)

    def drain(self) -> None:
        """Run every round that is owed and merge the exchange in flight; all ranks must call."""
        self._run(self.engine.drain())

    def average_parameters(self) -> None:
        """Replace every node's weights by their exact mean, the same bits everywhere.

        Each node counts once, which is the mean over ranks where nodes are equally large, and
        the mean that gossip conserves in any case. All ranks must call.
        """
        self._run(self.engine.average(WEIGHTS))

    def consensus_distance(self) -> float:
        """Ξ = √((1/n) Σᵢ ‖xᵢ − x̄‖²) over the n nodes; all ranks must call."""
        self.drain()
        memory = self.engine.seat.memory
        assert isinstance(memory, TorchMemory)
        memory.load([WEIGHTS])
        mean = memory.scratch()
        self._run(self.engine.deviation(mean))
        square = self.engine.squared_deviation(mean[WEIGHTS])
        world = self._session.world
        total = world.sum([square], "consensus_distance")[0]
        return float((total / len(self._session.cluster.nodes)) ** 0.5)

    # What the hooks call ---------------------------------------------------------------------

    def _reduced(self) -> None:
        """At the end of a backward that completed a reduction."""
        if self._delegated or self.engine.alone:
            return
        if self._changed():
            self._rebuild()
        if self.method.when == "reduction":
            self.engine.reduced()
            self._run(self.engine.step())
            return
        if self.engine.owed > self.options.staleness:
            # The last step was skipped, by a GradScaler say; peers wait for its round. Not
            # before backward: autograd would not notice that weights changed under it.
            self._run(self.engine.step())
        self.engine.reduced()

    def _before_step(self, *_: Any) -> None:
        self._depth += 1

    def _after_step(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._run(self.engine.step())

    def _pay(self) -> None:
        """Run a round whose optimizer step was skipped."""
        if self.engine.owed > self.options.staleness:
            self._run(self.engine.step())

    def _run(self, steps: Steps) -> None:
        drive(steps, self._limit)

    # How it is put together ------------------------------------------------------------------

    @property
    def _delegated(self) -> bool:
        """Whether Horovod itself reduces over the whole world."""
        return self.method.name == "allreduce" and self._session.scope == "world"

    def _agree(self, reduction: ReductionOptions) -> None:
        facts = {
            "method": self.method,
            "engine options": self.options,
            "reduction": reduction,
            "segments": self._segments if not callable(self._segments) else "a function",
            "the version of torch": torch.__version__,
            "the number of parameters": len(self._named),
        }
        for name, p in self._named:
            facts[f"parameter {name!r}"] = f"{tuple(p.shape)} {p.dtype} grad={p.requires_grad}"
        require_agreement(self._session.world, "DistributedOptimizer", facts)

    def _build(self) -> None:
        """Make layout, memory and engine for the parameters that want gradients now."""
        current = self._session
        trained = [(name, p) for name, p in self._named if p.requires_grad]
        if not trained:
            raise ConfigError("no parameter of this optimizer requires a gradient.")
        layout = _layout(trained, self._segments)
        by_name = dict(trained)
        slots = (*self.method.writes, *self.method.reads)
        memory = TorchMemory(layout, [by_name[f.name] for f in layout.fields], slots)
        seat = Seat(
            current.cluster,
            current.world.rank,
            layout,
            self._wire,
            memory,
            wire_dtype=self.options.wire_dtype,
            largest=self.options.chunk_bytes,
        )
        late = self.options.timing == "awc" and len(current.cluster.nodes) > 1
        self.engine = Engine(
            seat,
            self.method,
            seed=self.options.seed,
            timing=self.options.timing,
            staleness=self.options.staleness,
            progress=ThreadProgress() if late else None,
        )
        self._trained = [p.requires_grad for _, p in self._named]

    def _changed(self) -> bool:
        """Whether parameters were frozen or unfrozen since the engine was made."""
        return self._trained != [p.requires_grad for _, p in self._named]

    def _rebuild(self) -> None:
        """Start again with the parameters that want gradients now; on all ranks at once."""
        self.drain()
        old = self.engine
        old.close()
        assert isinstance(old.seat.memory, TorchMemory)
        old.seat.memory.detach()
        require_agreement(
            self._session.world,
            "parameters that require gradients",
            {f"parameter {n!r}": p.requires_grad for n, p in self._named},
        )
        self._build()
        self.engine.resume(old)

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.gossip = self  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        plain_zero_grad = optimizer.zero_grad

        @functools.wraps(plain_zero_grad)
        def zero_grad(*args: Any, **kwargs: Any) -> None:
            self._pay()
            plain_zero_grad(*args, **kwargs)

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        # Horovod's names; gradients are complete when backward returns, so nothing waits here.
        optimizer.synchronize = lambda: None  # type: ignore[attr-defined]
        optimizer.skip_synchronize = contextlib.nullcontext  # type: ignore[attr-defined]
        optimizer.set_backward_passes_per_step = self._set_passes  # type: ignore[attr-defined]

    def _set_passes(self, passes: int) -> None:
        self._reduction.passes = passes

    def _close(self) -> None:
        self.drain()
        self.engine.close()


def running() -> Iterator[Gossip]:
    """Every distributed optimizer that is still in use, in the order in which they were made."""
    return iter(sorted(_running, key=lambda g: int(g._key.rsplit(".", 1)[1])))


def _named(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[Named] | None
) -> list[Named]:
    """A unique name for every parameter of the optimizer, in the model's order."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return [
            (f"allreduce.noname.{i}.{j}", p)
            for i, group in enumerate(optimizer.param_groups)
            for j, p in enumerate(group["params"])
        ]
    named = list(named_parameters)
    if any(not isinstance(entry, tuple) for entry in named):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced "
            "by model.named_parameters()."
        )
    names = [name for name, _ in named]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(
            "Parameter names in named_parameters must be unique. Found duplicates: "
            f"{', '.join(duplicates)}"
        )
    ids = {id(p) for _, p in named}
    if any(id(p) not in ids for p in own):
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named."
        )
    mine = {id(p) for p in own}
    return [(name, p) for name, p in named if id(p) in mine]


def _layout(trained: Sequence[Named], segments: Segments) -> Layout:
    names = [name for name, _ in trained]
    count = segments
    if segments == "one":
        count = 1
    elif segments == "blocks" and names[0].startswith("allreduce.noname"):
        count = UNNAMED_SEGMENTS
    if isinstance(count, int):
        return Layout.equal([field_of(name, p, "") for name, p in trained], count)
    if isinstance(segments, str):
        if segments != "blocks":
            raise ConfigError(
                f"segments={segments!r}: expected 'blocks', 'one', a number, a function from a "
                "parameter's name to its segment's, or lists of names by segment."
            )
        blocks = blocks_of(names)
    else:
        assert not isinstance(segments, int)
        blocks = blocks_by(segments, names)
    return Layout.blocks([field_of(name, p, blocks[name]) for name, p in trained])


def _groups(named: Sequence[Named], num_groups: int, groups: Any) -> tuple[tuple[str, ...], ...]:
    """Horovod's groups as names."""
    if groups is None:
        groups = num_groups
    if isinstance(groups, int):
        if groups < 0:
            raise ValueError("groups should be a non-negative integer or a list of lists.")
        names = [name for name, p in named if p.requires_grad]
        cuts = [i * len(names) // groups for i in range(groups + 1)] if groups else []
        return tuple(tuple(names[a:b]) for a, b in itertools.pairwise(cuts) if b > a)
    names_by_id = {id(p): name for name, p in named}
    named_groups = tuple(tuple(names_by_id[id(p)] for p in group) for group in groups)
    flat = [name for group in named_groups for name in group]
    if len(flat) != len(set(flat)):
        raise ValueError("A parameter can only appear once in groups.")
    return named_groups


__all__ = ["DistributedOptimizer", "Gossip", "running"]
