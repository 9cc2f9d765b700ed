"""Compares values of two runs: gathers the kept part of a value, and computes its digest of a few numbers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchslim.prune.dependency.coupling import Mask
from torchslim.prune.dependency.trace import Shape

HUGE = 1e20


@functools.lru_cache(maxsize=32)  # sizes are powers of two: together they hold twice the largest
def _noise(size: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(20)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device)


def digest(value: Tensor) -> tuple[Shape, float, float]:
    """A value's shape, norm, and product with a fixed random vector: unequal values almost never have equal ones."""
    parts = torch.view_as_real(value.detach().resolve_conj()) if value.is_complex() else value.detach()
    flat = parts.reshape(-1).to(torch.float64)
    norm = float(torch.linalg.vector_norm(flat))
    if not norm < HUGE:  # masks hold infinities, or the largest number of their type
        flat = torch.where(flat.abs() < HUGE, flat, flat.sign().nan_to_num(nan=3.0) * 7.0)
        norm = float(torch.linalg.vector_norm(flat))
    size = 1 << max(flat.numel() - 1, 1).bit_length()
    noise = _noise(size, str(flat.device))[: flat.numel()]
    return tuple(value.shape), norm, float(flat @ noise)


def in_order(func: Any, args: Any, kwargs: Any, order: Tensor) -> Any:
    """Result of a sort in the order of the shrunk run, which decides near ties; the values in it are compared."""
    if func._opname == "nms":
        return order
    position = next(position for position, argument in enumerate(func._schema.arguments) if argument.name == "dim")
    dim = int(args[position] if len(args) > position else kwargs.get("dim", -1))
    return args[0].gather(dim, order), order


def gathered(value: Tensor, keep: list[Mask | None]) -> Tensor:
    """The kept part of a value."""
    for dim, mask in enumerate(keep):
        if mask is not None:
            kept = torch.from_numpy(np.flatnonzero(mask)).to(value.device)
            # along the last dimension index_select goes element by element, and takes twice as long
            value = value[..., kept] if dim == value.dim() - 1 else value.index_select(dim, kept)
    return value


def spread(value: Any, keep: list[Mask | None], shape: Shape) -> Any:
    """A compact value in its full shape, with zeros in place of removed elements."""
    if not isinstance(value, Tensor) or all(mask is None for mask in keep) or value.dim() != len(shape):
        return value
    for dim, mask in enumerate(keep):
        if mask is not None:
            size = list(value.shape)
            size[dim] = shape[dim]
            kept = torch.from_numpy(np.flatnonzero(mask)).to(value.device)
            value = value.new_zeros(size).index_copy_(dim, kept, value)
    return value


def zeroed(value: Tensor, keep: list[Mask | None]) -> Tensor:
    """The value with removed elements set to zero, in place unless it is expanded."""
    for dim, mask in enumerate(keep):
        if mask is not None and value.dim() > dim:
            removed = torch.from_numpy(np.flatnonzero(~mask)).to(value.device)
            if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
                value = value.clone()
            value.index_fill_(dim, removed, 0)
    return value
