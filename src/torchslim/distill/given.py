"""Checks of the arguments of losses: floating-point tensors with values, and labels of matching length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchslim.core.checks import got
from torchslim.errors import DistillError

NOT_OUTPUTS = "give what the models returned, or their features, not the models"


def check_tensors(**given: Any) -> None:
    """Raise DistillError unless every argument is a floating-point tensor that holds values; errors give its name."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise DistillError(f"{name} must be a tensor, {got(value)}; {NOT_OUTPUTS}")
        if not value.is_floating_point():
            raise DistillError(f"{name} must be of floating point, got {value.dtype}; convert it with .float()")
        _check_values(name, value)


def check_features(**given: Any) -> None:
    """Check as `check_tensors` does; an argument may also be a list of tensors, one for each tap."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            check_tensors(**{name: value})
        elif isinstance(value, (tuple, list)) and value:
            check_tensors(**{f"{name}[{number}]": tensor for number, tensor in enumerate(value)})
        else:
            raise DistillError(f"{name} must be a tensor or a list of tensors, {got(value)}; {NOT_OUTPUTS}")


def check_labels(target: Any, samples: int) -> None:
    """Raise DistillError unless `target` is None or a tensor with an entry for every sample."""
    if target is None:
        return
    if not isinstance(target, Tensor):
        raise DistillError(f"target must be a tensor of labels or None, {got(target)}")
    _check_values("target", target)
    if not target.dim() or len(target) != samples:
        raise DistillError(f"target must have a label for each of the {samples} samples, {got(target)}")


def _check_values(name: str, value: Tensor) -> None:
    if value.is_meta:
        raise DistillError(f"{name} is on the meta device and has no values; give a tensor with values")
    if not value.numel():
        raise DistillError(f"{name} is empty, {got(value)}; give at least one sample")
