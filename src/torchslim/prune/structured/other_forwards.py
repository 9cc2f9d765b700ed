"""Sizes that only other forward methods of a module read, such as a `forward_split` that an exporter calls.

A method `forward_...` that no example reached, and that computes the same as `forward` on the same inputs, has to do so
after the removal too. Where it does not, the module's numbers are changed one at a time until it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.isolation import duplicate, preserved_globals
from torchslim.core.step import Inputs
from torchslim.core.train_modes import eval_mode
from torchslim.core.trees import changed, tensors
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.trace import call
from torchslim.prune.structured.attributes import size_changes
from torchslim.prune.structured.surgery import Patch, Surgery, apply_patch, perform

PREFIX = "forward_"

CLOSE = 1e-4
"""The largest difference of equal results, relative to their largest value: a method may sum in another order."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The first call of a module in a run."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]

    def same(self, method: Any) -> bool:
        """Whether a method computes the same from the same inputs."""
        args, kwargs = changed((self.args, self.kwargs), lambda tensor: tensor.clone())
        try:
            outputs = tensors(method(*args, **kwargs))
        except Exception:  # noqa: BLE001 - a user's method may raise anything, and then it does not compute the same
            return False
        return len(outputs) == len(self.outputs) and all(map(_close, outputs, self.outputs))


def with_other_forwards(
    model: nn.Module, coupling: Coupling, removed: Mask, inputs: Inputs, surgery: Surgery
) -> Surgery:
    """The surgery, with patches of the numbers that only other forward methods read.

    Args:
        model: read only.
        coupling: of a trace of this model.
        removed: mask of the atoms that go.
        inputs: those of the trace.
        surgery: for the removal; the model runs after it.
    """
    methods = _other_forwards(model, coupling.trace.unseen.methods)
    if not methods:
        return surgery
    whole, shrunk = duplicate(model), perform(model, surgery)
    paths = {path for path, _ in methods}
    changes = size_changes(model, coupling, removed)
    patched = {(patch.module, patch.name, patch.place) for patch in surgery.patches}
    patches = []
    with preserved_globals(), torch.no_grad(), eval_mode(whole), eval_mode(shrunk):
        before, after = _calls(whole, inputs, paths), _calls(shrunk, inputs, paths)
        for path, name in methods:
            if path not in before or not before[path].same(getattr(whole.get_submodule(path), name)):
                continue  # it computes something else, such as a convolution without its norm
            open_changes = [patch for patch in changes(path) if (patch.module, patch.name, patch.place) not in patched]
            patches += _mended(shrunk, after[path], f"{path}.{name}", open_changes)
    return Surgery(surgery.cuts, (*surgery.patches, *patches))


def _mended(shrunk: nn.Module, expected: _Call, method: str, changes: Sequence[Patch]) -> list[Patch]:
    """The change with which a method computes the same as `forward`, which must not change; none if it does already."""
    path, _, name = method.rpartition(".")
    module = shrunk.get_submodule(path)
    if expected.same(getattr(module, name)):
        return []
    for patch in changes:
        apply_patch(shrunk, patch)
        if expected.same(getattr(module, name)) and expected.same(module.forward):
            return [patch]
        apply_patch(shrunk, patch, back=True)
    return []


def _other_forwards(model: nn.Module, unreached: Sequence[str]) -> list[tuple[str, str]]:
    """Path and method of every module of a class that has such a method; `unreached` names one module of a class."""
    names: dict[type, list[str]] = {}
    for method in unreached:
        path, _, name = method.rpartition(".")
        if name.startswith(PREFIX):
            names.setdefault(type(model.get_submodule(path)), []).append(name)
    return [(path, name) for path, module in model.named_modules() for name in names.get(type(module), ())]


def _calls(model: nn.Module, inputs: Inputs, paths: set[str]) -> dict[str, _Call]:
    """The first call of each module in one run of the model."""
    calls: dict[str, _Call] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
            if path not in calls:
                own_args, own_kwargs = changed((args, kwargs), lambda tensor: tensor.clone())
                calls[path] = _Call(own_args, own_kwargs, [tensor.clone() for tensor in tensors(outputs)])

        return hook

    handles = [model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _close(value: Tensor, expected: Tensor) -> bool:
    if value.shape != expected.shape:
        return False
    difference = (value.double() - expected.double()).abs().max() if value.numel() else torch.zeros(())
    return bool(difference <= CLOSE * expected.double().abs().max()) if expected.numel() else True
