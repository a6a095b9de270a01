"""``DistributedGradientTape``: gradients averaged over the node, weights mixed before the update.

A tape sees the gradients and not the update, so it mixes in between:

    x_i ← Σ_j W_ij x_j − γ d(x_i)

which is the papers' D-PSGD in its first form, whatever optimizer follows. With
``DistributedOptimizer`` the exchange comes after the update instead; use one of the two.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from gossip_hvd import session
from gossip_hvd.blocks import Segments
from gossip_hvd.errors import ConfigError
from gossip_hvd.methods import Method, method_of
from gossip_hvd.options import EngineOptions
from gossip_hvd.rounds import MOMENTUM, VARIANCE
from gossip_hvd.settings import setting
from gossip_hvd.tensorflow.framework import TensorFlow
from gossip_hvd.tensorflow.keras.arguments import node_average
from gossip_hvd.tensorflow.keras.names import blocks_of, name_of
from gossip_hvd.variables import VariablesGossip


def DistributedGradientTape(  # noqa: N802 - Horovod's name
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = horovod.Compression.none,
    sparse_as_dense: bool = False,
    op: Any = horovod.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
    *,
    method: str | Method | None = None,
    segments: Segments = "blocks",
    **options: Any,
) -> tf.GradientTape:
    """Make a tape's ``gradient`` train together with all other ranks; returns the same tape.

    Args:
        gradtape: any tape; scripts make a new one each step. The gossip belongs to the variables
            that ``gradient`` is asked about, and goes on from tape to tape.
        device_dense: Horovod's argument; accepted, TensorFlow places operations.
        device_sparse: likewise.
        compression: of gradients inside the node, as Horovod's.
        sparse_as_dense: turn sparse gradients, of embeddings say, into dense ones.
        op: ``Average`` or ``Sum`` inside the node.
        gradient_predivide_factor: splits the averaging before and after the sum, as Horovod's.
        num_groups: reduce gradients in so many groups, as Horovod's.
        groups: or in these groups: a number, or lists of variables.
        process_set: Horovod's argument; only the global set makes sense here.
        scale_local_gradients: Horovod's argument; accepted, no gradient stays local here.
        method: as for ``DistributedOptimizer``.
        segments: likewise.
        options: likewise.

    Raises:
        ConfigError: for what is unknown, has no meaning here, or differs between ranks.
        ValueError: for what Horovod refuses too.
    """
    framework = TensorFlow()
    how = node_average(
        framework,
        compression=compression,
        op=op,
        predivide=gradient_predivide_factor,
        sparse_as_dense=sparse_as_dense,
        groups=num_groups if groups is None else groups,
        process_set=process_set,
    )
    engine = EngineOptions.take(options)
    chosen = method_of(setting("METHOD", method), EngineOptions.names(), **options)
    if (
        chosen.needs_rate
        or chosen.needs_loss
        or {MOMENTUM, VARIANCE} & {*chosen.reads, *chosen.writes}
    ):
        raise ConfigError(
            f"method {chosen.name!r} needs the learning rate, the loss or the optimizer's history, "
            "and a tape sees none of them: use DistributedOptimizer."
        )
    gradtape.__class__ = _distributed(type(gradtape))  # type: ignore[arg-type]

    def make() -> VariablesGossip:
        current = session.current()
        return VariablesGossip(current, framework, chosen, engine, segments, how, owner="tape")

    gradtape._make_gossip = make
    return gradtape


class _Distributed:
    """What is put in front of a tape's class."""

    _make_gossip: Any

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def gradient(self, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        """The gradients, averaged; the weights of ``sources`` have been mixed when it returns."""
        gradients = super().gradient(target, sources, *args, **kwargs)  # type: ignore[misc]
        flat = tf.nest.flatten(gradients, expand_composites=False)
        variables = tf.nest.flatten(sources, expand_composites=False)
        present = [i for i, gradient in enumerate(flat) if gradient is not None]
        gossip = _gossip_of(variables, self._make_gossip)
        averaged = gossip.average([flat[i] for i in present], [variables[i] for i in present])
        for i, gradient in zip(present, averaged, strict=True):
            flat[i] = gradient
        gossip.exchange()
        return tf.nest.pack_sequence_as(gradients, flat)


_gossips: dict[tuple[object, ...], VariablesGossip] = {}


def _gossip_of(variables: list[Any], make: Any) -> VariablesGossip:
    """The gossip of these variables; made for the first tape that is asked about them."""
    keys = tuple(map(TensorFlow().key, variables))
    for key in [k for k, one in _gossips.items() if one.session is not session.current()]:
        del _gossips[key]
    gossip = _gossips.get(keys)
    if gossip is None:
        gossip = _gossips[keys] = make()
        gossip.begin([(name_of(v), v) for v in variables], blocks_of)
    return gossip


@cache
def _distributed(base: type) -> type:
    return type(base.__name__, (_Distributed, base), {"__module__": base.__module__})
