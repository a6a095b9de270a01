"""``DistributedOptimizer`` for Keras 3: the optimizer's class is swapped, the object stays.

It keeps its state, its variables and its place in a model. Gradients are averaged over the node
where Keras is about to clip them, which is once for each real update, and weights are exchanged
after ``apply``. A saved model names the optimizer's own class and loads without this library.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache
from typing import Any

import keras

from gossip_hvd import session
from gossip_hvd.blocks import Segments
from gossip_hvd.errors import ConfigError
from gossip_hvd.methods import Method, method_of
from gossip_hvd.options import EngineOptions
from gossip_hvd.settings import setting
from gossip_hvd.tensorflow.keras.arguments import accumulate, fitted, history_of, node_average
from gossip_hvd.tensorflow.keras.backend import framework
from gossip_hvd.tensorflow.keras.names import blocks_of, name_of
from gossip_hvd.variables import VariablesGossip

LossScaleOptimizer = keras.optimizers.LossScaleOptimizer
OUTER = (LossScaleOptimizer, keras.optimizers.MultiOptimizer)
"""Optimizers that hand gradients to others; those of all must be averaged before."""


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = None,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = None,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
    *,
    method: str | Method | None = None,
    segments: Segments = "blocks",
    **options: Any,
) -> Any:
    """Make a Keras optimizer train together with all other ranks; returns the same optimizer.

    Under the policy ``mixed_float16`` it returns a ``LossScaleOptimizer`` around it, as Keras's
    own ``compile`` would make, so that gradients are averaged before they are looked at.

    Args:
        optimizer: any Keras 3 optimizer, or the name of one; ``optimizer.gossip`` is added to it.
        name: renames the optimizer.
        device_dense: Horovod's argument; accepted, Keras places operations.
        device_sparse: likewise.
        compression: of gradients inside the node, as Horovod's.
        sparse_as_dense: turn sparse gradients, of embeddings say, into dense ones.
        gradient_predivide_factor: splits the averaging before and after the sum, as Horovod's.
        op: ``Average`` or ``Sum`` inside the node.
        backward_passes_per_step: gradients that are accumulated before an update; the same as
            the optimizer's ``gradient_accumulation_steps``.
        average_aggregated_gradients: whether accumulated gradients are averaged, not added.
        num_groups: reduce gradients in so many groups, as Horovod's.
        groups: or in these groups: a number, or lists of variables.
        process_set: Horovod's argument; only the global set makes sense here.
        scale_local_gradients: Horovod's argument; accepted, no gradient stays local here.
        method: ``"crossover"`` (the default) or any other of ``gossip_hvd.methods``, by name or
            as an object; else ``GOSSIP_HVD_METHOD``.
        segments: ``"blocks"`` (the model's own), ``"one"``, a number of equally large ones, a
            function from a variable's path to its segment's name, or lists of paths by segment.
        options: of the engine (``seed``, ``timing``, ``staleness``, ``wire_dtype``, …) and of
            the method (``peers``, ``topology``, …).

    Raises:
        ConfigError: for what is unknown, has no meaning here, or differs between ranks.
        ValueError: for what Horovod refuses too.
    """
    below = framework()
    current = session.current()
    optimizer = keras.optimizers.get(optimizer)
    if getattr(optimizer, "gossip", None) is not None:
        raise ConfigError("this optimizer is distributed already: wrap it once.")
    how = node_average(
        below,
        compression=compression,
        op=op,
        predivide=gradient_predivide_factor,
        sparse_as_dense=sparse_as_dense,
        groups=num_groups if groups is None else groups,
        passes=backward_passes_per_step,
        average_passes=average_aggregated_gradients,
        process_set=process_set,
    )
    engine = EngineOptions.take(options)
    chosen = fitted(
        method_of(setting("METHOD", method), EngineOptions.names(), **options), optimizer
    )
    if name is not None:
        optimizer.name = name
    accumulate(optimizer, backward_passes_per_step)
    if keras.config.dtype_policy().name == "mixed_float16" and not isinstance(optimizer, OUTER):
        optimizer = LossScaleOptimizer(optimizer)
    # Not through the optimizer's own __setattr__, which would track and save what it is given.
    gossip = VariablesGossip(current, below, chosen, engine, segments, how)
    object.__setattr__(optimizer, "gossip", gossip)
    object.__setattr__(optimizer, "__class__", _distributed(type(optimizer)))  # type: ignore[arg-type]
    return optimizer


_Base: Any = object
"""A Keras optimizer; which one is decided when the class is put in front of it."""


class _Distributed(_Base):  # type: ignore[misc]
    """What is put in front of an optimizer's class."""

    gossip: VariablesGossip
    built: bool
    _plain: Any
    _present: Sequence[Any] = ()
    _loss: Any = None

    @classmethod
    def from_config(cls, config: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """A plain optimizer with the same settings; one that trains with others must be wrapped."""
        return cls._plain.from_config(config, *args, **kwargs)

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Keras's ``apply``, with everybody's gradients; then the round that is due."""
        self._apply(grads, trainable_variables)
        if self.gossip.begun:
            self._exchange()

    def scale_loss(self, loss: Any) -> Any:
        """Keras's ``scale_loss``, which is where a training step shows its loss."""
        if self.gossip.method.needs_loss:
            self._keep("_loss", loss)
        return super().scale_loss(loss)

    def register_local_var(self, var: Any) -> None:
        """Refused: the ranks of a node hold equal variables.

        Raises:
            ConfigError: says what to do instead.
        """
        raise ConfigError(
            "register_local_var keeps a variable local to a rank, and a node's ranks must stay "
            "equal: train local variables with an optimizer of their own."
        )

    def _apply(self, grads: Sequence[Any], trainable_variables: Any) -> None:
        super().apply(grads, trainable_variables)

    def begin(self) -> None:
        """Tell the gossip of the variables, once they are known."""
        variables = self._trainable_variables
        if not all(self.gossip.trains(v) for v in variables):
            _refuse_inside_another(self)
            named = [(name_of(v), v) for v in variables]
            self.gossip.begin(named, blocks_of, history_of(self, self.gossip.framework, variables))

    def _average(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        return self.gossip.average(grads, variables, *self._rate())

    def _exchange(self) -> None:
        loss, self._loss = self._loss, None
        if not self.gossip.active:
            return
        if loss is not None:
            loss = self.gossip.framework.average_number(loss, self.gossip.how)
        numbers = [*self._rate(), *([] if loss is None else [loss])]
        self.gossip.exchange(*numbers)

    def _rate(self) -> list[Any]:
        needed = self.gossip.method.needs_rate or self.gossip.method.needs_loss
        return [keras.ops.convert_to_tensor(self.learning_rate)] if needed else []

    def _given(self, variables: Any) -> list[Any]:
        """The variables of an ``apply``: all, where none are named."""
        return list(self._trainable_variables if variables is None else variables)

    def _keep(self, name: str, value: Any) -> None:
        # Keras would track what an ordinary assignment gives an optimizer.
        object.__setattr__(self, name, value)


class _Inner(_Distributed):
    """An optimizer that updates variables itself."""

    def _backend_apply_gradients(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        self.begin()
        self._keep("_present", variables)
        super()._backend_apply_gradients(grads, variables)
        self._keep("_present", ())

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        return super()._clip_gradients(self._average(grads, self._present))

    def _apply(self, grads: Sequence[Any], trainable_variables: Any) -> None:
        variables = self._given(trainable_variables)
        super()._apply(self.gossip.framework.filled(grads, variables), variables)

    def _exchange(self) -> None:
        steps = self.gradient_accumulation_steps
        if not steps:
            super()._exchange()
            return
        due = keras.ops.equal(self._iterations % steps, 0)
        keras.ops.cond(due, super()._exchange, lambda: None)


class _Outer(_Distributed):
    """An optimizer that looks at gradients, or sorts them, and hands them to others."""

    def _apply(self, grads: Sequence[Any], trainable_variables: Any) -> None:
        if not self.built:
            with keras.name_scope(self.name):
                self.build(list(trainable_variables))
            self.built = True
        variables = self._given(trainable_variables)
        self.begin()
        grads = list(self.gossip.framework.filled(grads, variables))
        present = [i for i, g in enumerate(grads) if g is not None]
        averaged = self._average([grads[i] for i in present], [variables[i] for i in present])
        for i, gradient in zip(present, averaged, strict=True):
            grads[i] = gradient
        super()._apply(grads, variables)


def _refuse_inside_another(optimizer: Any) -> None:
    """Raise where an optimizer hands gradients to this one; nothing but a search can tell."""
    for other in gc.get_objects():
        if not issubclass(type(other), OUTER) or other is optimizer:
            continue
        inner = getattr(other, "optimizers", None) or [getattr(other, "inner_optimizer", None)]
        if any(one is optimizer for one in inner):
            raise ConfigError(
                f"a distributed {type(optimizer).__name__} is inside a {type(other).__name__} "
                "(model.compile puts it there where the model's policy is mixed_float16): it "
                "would wait for ranks that skip the step. Distribute the outer one, "
                "hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer)), or "
                "set the policy by keras.config.set_dtype_policy before DistributedOptimizer."
            )


@cache
def _distributed(base: type) -> type:
    """The class of a distributed optimizer; to Keras, when it saves one, it is the base itself."""
    mixin = _Outer if issubclass(base, OUTER) else _Inner
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_plain": base,
        "apply": framework().untraced(mixin.apply),
    }
    return type(base.__name__, (mixin, base), members)
