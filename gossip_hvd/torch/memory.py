"""A PyTorch model's payload slots as flat bytes: views where that is safe, copies elsewhere.

The parameters themselves become views of one flat buffer (``p.data`` points into it), so nothing
is packed and a peer's bytes are mixed where the model reads them. Parameters on a GPU, or of a
memory format that a view cannot keep, are copied in and out instead; the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from gossip_hvd.errors import ConfigError
from gossip_hvd.rounds import GRADIENTS, WEIGHTS
from gossip_hvd.segments import Field, Layout
from gossip_hvd.transport import Bytes

NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def field_of(name: str, tensor: torch.Tensor) -> Field:
    """The field of one parameter; complex numbers count as pairs.

    Raises:
        ConfigError: for a dtype that cannot be averaged.
    """
    dtype, size = tensor.dtype, tensor.numel()
    if dtype in COMPLEX:
        dtype, size = COMPLEX[dtype], size * 2
    if dtype not in NAMES:
        raise ConfigError(
            f"parameter {name!r} is {tensor.dtype}: only floating and complex parameters can be "
            "averaged. Freeze it (requires_grad=False) or make it a buffer."
        )
    return Field(name, NAMES[dtype], size, dtype.itemsize)


class TorchMemory:
    """The flat bytes of one model; see ``flight.Memory``.

    Args:
        layout: of the parameters.
        parameters: in the layout's order.
        slots: which payload slots to hold, weights included.
        history: finds a parameter's buffer in the optimizer, for the slots ``"momentum"`` and
            ``"variance"``; None where there is none yet, which counts as zeros.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Sequence[torch.Tensor],
        slots: Iterable[str] = (WEIGHTS,),
        history: Callable[[str, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> None:
        self._layout, self._parameters, self._history = layout, list(parameters), history
        self._flat: dict[str, torch.Tensor] = {}
        self._bytes: dict[str, Bytes] = {}
        self._places: dict[str, list[torch.Tensor]] = {}
        for slot in dict.fromkeys((WEIGHTS, *slots)):
            self._flat[slot] = torch.zeros(layout.nbytes, dtype=torch.uint8)
            self._bytes[slot] = self._flat[slot].numpy()
            self._places[slot] = self._cut(self._flat[slot])
        self.load([WEIGHTS])

    def __getitem__(self, slot: str) -> Bytes:
        """The bytes of one slot."""
        return self._bytes[slot]

    def items(self) -> Iterable[tuple[str, Bytes]]:
        """All slots."""
        return self._bytes.items()

    def load(self, slots: Iterable[str]) -> None:
        """Bring tensors into the flat bytes; parameters that can be views become views."""
        with torch.no_grad():
            for slot in slots:
                for parameter, place in zip(self._parameters, self._places[slot], strict=True):
                    if slot == WEIGHTS:
                        self._adopt(parameter, place)
                    elif (source := self._tensor(slot, parameter)) is None:
                        place.zero_()
                    else:
                        place.copy_(source.to_dense() if source.is_sparse else source)

    def save(self, slots: Iterable[str]) -> None:
        """Bring the flat bytes back into tensors that are not views of them."""
        with torch.no_grad():
            for slot in slots:
                for parameter, place in zip(self._parameters, self._places[slot], strict=True):
                    target = parameter.data if slot == WEIGHTS else self._tensor(slot, parameter)
                    if target is None:
                        continue
                    if target.is_sparse:  # a gradient: no optimizer keeps sparse history
                        parameter.grad = place.to_sparse(target.sparse_dim())
                    elif target.data_ptr() != place.data_ptr():
                        target.copy_(place)

    def detach(self) -> None:
        """Give every parameter memory of its own again."""
        with torch.no_grad():
            for parameter, place in zip(self._parameters, self._places[WEIGHTS], strict=True):
                if parameter.data_ptr() == place.data_ptr():
                    parameter.data = parameter.data.clone(memory_format=torch.preserve_format)

    def _tensor(self, slot: str, parameter: torch.Tensor) -> torch.Tensor | None:
        if slot == GRADIENTS:
            return parameter.grad
        return None if self._history is None else self._history(slot, parameter)

    def _adopt(self, parameter: torch.Tensor, place: torch.Tensor) -> None:
        """Copy a parameter into its place, and let it live there from now on if it can."""
        data = parameter.data
        if data.data_ptr() == place.data_ptr() and data.dtype == place.dtype:
            return
        if data.dtype != place.dtype or data.shape != place.shape:
            raise ConfigError(
                f"a parameter became {data.dtype} {tuple(data.shape)}; it was {place.dtype} "
                f"{tuple(place.shape)} when the optimizer was wrapped. Convert the model first, "
                "then call DistributedOptimizer."
            )
        place.copy_(data)
        if data.device.type == "cpu" and place.stride() == data.stride():
            parameter.data = place

    def _cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """A view of each parameter's bytes with the parameter's own shape and strides."""
        places = []
        layout = self._layout
        for parameter, field, start in zip(
            self._parameters, layout.fields, layout.offsets, strict=True
        ):
            place = flat[start : start + field.nbytes].view(parameter.dtype)
            if _dense(parameter):
                places.append(place.as_strided(parameter.shape, parameter.stride()))
            else:
                places.append(place.view(parameter.shape))
        return places


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the strides fill memory without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def flat_bytes(tensor: torch.Tensor) -> Bytes:
    """A contiguous CPU tensor's memory as bytes."""
    return np.asarray(tensor.reshape(-1).view(torch.uint8).numpy())
