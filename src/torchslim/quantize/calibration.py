"""Calibration: shows batches to a prepared model's observers, and refuses values that are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchslim.core.trees import device_of
from torchslim.errors import QuantizeError
from torchslim.graph.calling import bind
from torchslim.graph.io_structure import flatten, leaf_names
from torchslim.quantize.lowering import observed_layers

if TYPE_CHECKING:
    from torchslim.quantize.modules import Prepared


def show_batches(prepared: Prepared, batches: list[Any]) -> None:
    """Show the observers every batch; a value that is not finite raises an error with its layer and batch."""
    if not batches:
        raise QuantizeError("no calibration batches were given; 100 to 500 samples of real data will do")
    program = prepared.program
    switches = (False, False) if prepared.qat else ()
    names = leaf_names(prepared.inputs)
    device = device_of(program)
    number = 0

    def check(value: Tensor, where: str) -> None:
        if not _finite(value):
            raise QuantizeError(
                f"calibration batch {number} has values that are not finite {where}; look for NaN in the data or "
                "overflow in the model"
            )

    def guard(where: str) -> Any:
        return lambda module, args: check(args[0], f"at {where}")

    handles = [
        program.get_submodule(name).register_forward_pre_hook(guard(where))
        for name, where in observed_layers(program).items()
    ]
    try:
        for number, inputs in enumerate(batches, 1):
            named = bind(prepared, inputs)
            leaves = flatten(prepared.inputs, named, f"calibration batch {number}")
            prepared.check_sizes(leaves)
            for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
                # masks may hold -inf; it is an error only where it reaches a layer
                check(leaf.masked_fill(torch.isneginf(leaf), 0.0), f"in input {index} ({name!r})")
            try:
                with torch.no_grad():
                    program(*(leaf.to(device) for leaf in leaves), *switches)
            except QuantizeError:
                for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
                    check(leaf, f"in input {index} ({name!r})")
                raise
            except Exception as error:
                shapes = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in zip(names, leaves, strict=True))
                raise QuantizeError(
                    f"calibration batch {number} ({shapes}) does not fit the graph that batch 1 gave: "
                    f"{next(iter(str(error).splitlines()), '')}; give batches of the same sizes"
                ) from error
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    low, high = torch.aminmax(value.detach())  # one pass, no copy; NaN shows in both
    return bool(torch.isfinite(low) & torch.isfinite(high))
