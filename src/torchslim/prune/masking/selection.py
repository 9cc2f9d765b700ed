"""Exact decisions on which units to remove, per row or over all layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchslim.errors import PruneError


def check_sparsity(sparsity: float, what: str = "sparsity") -> None:
    """Raise PruneError unless `sparsity`, the fraction removed, is a number in [0, 1)."""
    if not isinstance(sparsity, (int, float)):
        raise PruneError(f"{what} must be a number in [0, 1), got {sparsity!r}")
    if not (math.isfinite(sparsity) and 0 <= sparsity < 1):
        hint = "; to drop a whole layer, leave it out of the model" if sparsity == 1 else ""
        raise PruneError(f"{what} must be in [0, 1), the fraction that is removed, got {sparsity}{hint}")


def keep_per_row(scores: Tensor, sparsity: float) -> Tensor:
    """A mask that drops exactly round(sparsity * units) of every row: lowest first, among equals earlier first.

    Shapes: (rows, units) -> (rows, units), boolean.
    """
    dropped = round(sparsity * scores.shape[1])
    # stable: ties must not change how many are dropped, nor depend on the device
    order = scores.argsort(dim=1, stable=True)
    keep = torch.ones_like(scores, dtype=torch.bool)
    return keep.scatter_(1, order[:, :dropped], False)


def keep_globally(scores: Sequence[Tensor], costs: Sequence[int], sparsity: float) -> list[Tensor]:
    """Masks that drop the lowest units of all layers together, with a cost as near the target as possible.

    If every unit costs one weight, exactly round(sparsity * n) are dropped.

    Args:
        scores: the scores of each layer's units, of shape (1, units).
        costs: the number of weights in a unit of each layer.
        sparsity: the fraction of all weights to remove.
    """
    flat = torch.cat([score.reshape(-1).cpu() for score in scores])  # a model may live on several devices
    cost = torch.cat([torch.full((score.numel(),), unit_cost) for score, unit_cost in zip(scores, costs, strict=True)])
    order = flat.argsort(stable=True)
    spent = torch.cat([torch.zeros(1, dtype=torch.long), cost[order].cumsum(0)])
    target = round(sparsity * int(spent[-1]))
    dropped = int((spent - target).abs().argmin())
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    keep[order[:dropped]] = False
    parts = keep.split([score.numel() for score in scores])
    return [part.reshape(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]
