"""PyTorch as ``variables.Framework``: what Keras needs when PyTorch is its backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import horovod.torch as horovod
import torch

from gossip_hvd import session
from gossip_hvd.memory import Memory
from gossip_hvd.rounds import GRADIENTS, WEIGHTS
from gossip_hvd.segments import Field, Layout
from gossip_hvd.torch.memory import TorchMemory, field_of
from gossip_hvd.torch.reduction import NATIVE
from gossip_hvd.variables import Action, NodeAverage


class KerasMemory(TorchMemory):
    """A ``TorchMemory`` whose gradients are handed over instead of being looked up."""

    def __init__(self, layout: Layout, variables: Mapping[str, Sequence[Any]]) -> None:
        parameters = [native(v) for v in variables[WEIGHTS]]
        held = {
            (slot, id(p)): native(h)
            for slot, history in variables.items()
            for p, h in zip(parameters, history, strict=True)
            if slot != WEIGHTS and h is not None
        }

        def history(slot: str, parameter: torch.Tensor) -> torch.Tensor | None:
            return held.get((slot, id(parameter)))

        self._given: dict[int, torch.Tensor] = {}
        super().__init__(layout, parameters, variables, history)

    def give(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """The gradients of this step, by position in the layout."""
        self._given = {id(self._parameters[i]): g for i, g in gradients.items()}

    def _tensor(self, slot: str, parameter: torch.Tensor) -> torch.Tensor | None:
        if slot == GRADIENTS:
            return self._given.get(id(parameter))
        return super()._tensor(slot, parameter)


class Torch:
    """See ``variables.Framework``; everything happens at once."""

    name = "torch"
    hvd = horovod

    def untraced(self, function: Action) -> Action:
        """The function, which ``torch.compile`` (Keras's ``jit_compile=True``) leaves as it is."""
        disabled: Action = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled

    def key(self, variable: Any) -> object:
        """What identifies a variable."""
        return id(native(variable))

    def field(self, name: str, variable: Any) -> Field:
        """The variable's place in a flat buffer."""
        return field_of(name, native(variable))

    def memory(self, layout: Layout, variables: Mapping[str, Sequence[Any]]) -> KerasMemory:
        """The flat bytes of each slot; weights live in them."""
        return KerasMemory(layout, variables)

    def filled(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Sequence[Any]:
        """Zeros for variables that this rank's batch has not touched."""
        if session.current().world.size == 1:
            return gradients
        pairs = zip(gradients, variables, strict=True)
        return [torch.zeros_like(native(v)) if g is None else g for g, v in pairs]

    def average(self, gradients: Sequence[Any], how: NodeAverage) -> list[Any]:
        """The gradients averaged over the node, all in one operation."""
        tensors = [g.to_dense() if g.is_sparse else g for g in gradients]
        if how.process_set is not None and tensors:
            tensors = _reduce(tensors, how)
        if how.factor != 1.0:
            tensors = [g * how.factor for g in tensors]
        return tensors

    def average_number(self, number: Any, how: NodeAverage) -> Any:
        """One number averaged over the node."""
        number = torch.as_tensor(number).detach().float()
        if how.process_set is None:
            return number
        return horovod.allreduce(
            number, op=horovod.Average, name=f"{how.prefix}_number", process_set=how.process_set
        )

    def run(
        self,
        memory: Memory,
        slots: Sequence[str],
        action: Action,
        numbers: Sequence[Any] = (),
        gradients: Mapping[int, Any] | None = None,
    ) -> dict[int, Any]:
        """Call ``action`` now; gradients are changed in place."""
        assert isinstance(memory, KerasMemory)
        changed = {i: g.clone() for i, g in (gradients or {}).items()}
        memory.give(changed)
        action(*(float(number) for number in numbers))
        return changed


def native(variable: Any) -> torch.Tensor:
    """PyTorch's own tensor, also of a Keras variable."""
    tensor = variable if isinstance(variable, torch.Tensor) else variable.value
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _reduce(gradients: Sequence[torch.Tensor], how: NodeAverage) -> list[torch.Tensor]:
    real = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
    wide = [g if g.dtype in NATIVE else g.float() for g in real]
    average = how.op == horovod.Average
    packed, contexts = zip(*(how.compression.compress(g) for g in wide), strict=True)
    reduced = horovod.grouped_allreduce(
        [tensor.contiguous() for tensor in packed],
        op=how.op,
        prescale_factor=1.0 / how.predivide if average else 1.0,
        postscale_factor=how.predivide if average else 1.0,
        process_set=how.process_set,
        name=how.prefix,
    )
    unpacked = map(how.compression.decompress, reduced, contexts)
    return [
        torch.view_as_complex(r) if g.is_complex() else r.to(g.dtype)
        for r, g in zip(unpacked, gradients, strict=True)
    ]
