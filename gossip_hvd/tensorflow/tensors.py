"""What TensorFlow's operations have in common: their inputs, the shapes of results, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from gossip_hvd.tensorflow.memory import native


def tensor_of(value: Any) -> Any:
    """A tensor, also of a variable of Keras's."""
    if isinstance(value, tf.IndexedSlices):
        return value
    if hasattr(value, "path") and hasattr(value, "value"):
        value = native(value)
    return tf.convert_to_tensor(value)


def dtypes(tensors: Sequence[Any]) -> list[Any]:
    """The dtypes of tensors."""
    return [tensor.dtype for tensor in tensors]


def shaped(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The outputs, with the shapes that the inputs have."""
    return [tf.ensure_shape(out, x.shape) for out, x in zip(outputs, inputs, strict=True)]


def shaped_rows(output: Any, like: Any) -> Any:
    """The output, with rows like those of another tensor."""
    return tf.ensure_shape(output, [None, *like.shape[1:]])


def differentiable(
    forward: Callable[..., list[Any]], backward: Callable[[Sequence[Any], Sequence[Any]], list[Any]]
) -> Callable[..., list[Any]]:
    """``forward`` with its own gradient, which is given those of the outputs, and the outputs."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def both(*inputs: Any) -> Any:
        outputs = forward(*inputs)

        def gradient(*upstream: Any) -> Any:
            return backward(upstream, outputs)

        return outputs, gradient

    return lambda *inputs: list(both(*inputs))
