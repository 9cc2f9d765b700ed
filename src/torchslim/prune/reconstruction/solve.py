"""Ridge regression on running sums: the update of a weight that brings its output nearest to a target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = (1e-8, 1e-5, 1e-3, 1e-1)
"""Ridge penalties that are tried, as fractions of the mean squared feature."""

ITERATIONS = 100
"""The largest number of steps of conjugate gradients; each costs one product with the Gram matrix."""

PRECISE = 1e-10
"""Conjugate gradients stop where the residual is this small, relative to the first."""


@dataclass
class Sums:
    """Sums over rows of a regression of residuals r (the target minus the output now) on features x.

    Args:
        gram: x x', (groups, features, features).
        cross: x r', (groups, features, outputs).
        squares: the sum of r ** 2.
        target: the sum of the target's squares.
        rows: their number.
    """

    gram: Tensor
    cross: Tensor
    squares: float = 0.0
    target: float = 0.0
    rows: int = 0

    @classmethod
    def empty(cls, groups: int, features: int, outputs: int, device: torch.device) -> Sums:
        """Sums of no rows, in float64."""
        gram, cross = (
            torch.zeros(groups, features, size, dtype=torch.float64, device=device) for size in (features, outputs)
        )
        return cls(gram, cross)

    def add(self, features: Tensor, residual: Tensor, target: Tensor) -> None:
        """Add rows. Shapes: (rows, groups, features), (rows, groups, outputs), (rows, groups, outputs)."""
        left = features.transpose(0, 1)
        self.gram.baddbmm_(left.mT, left)
        self.cross.baddbmm_(left.mT, residual.transpose(0, 1))
        self.squares += float(residual.square().sum())
        self.target += float(target.square().sum())
        self.rows += len(features)

    def plus(self, other: Sums) -> Sums:
        """The sums of both."""
        return Sums(
            self.gram + other.gram,
            self.cross + other.cross,
            self.squares + other.squares,
            self.target + other.target,
            self.rows + other.rows,
        )

    def error(self, update: Tensor) -> float:
        """The squared error that is left after an update of the weight, (groups, features, outputs)."""
        return self.squares + float((update * (self.gram @ update - 2 * self.cross)).sum())


@dataclass(frozen=True)
class Solution:
    """An update, and the squared errors over the target's squares on rows that it was not fitted to."""

    update: Tensor | None  # None: none lowers the error
    before: float
    after: float


def solve(fit: Sums, held: Sums, support: Tensor | None = None) -> Solution:
    """The ridge solution whose penalty is best on held-out rows, fitted again to all rows; none if none is better.

    The penalty is on the update, not on the weight: so the error on all rows never rises.

    Args:
        fit: rows to fit to.
        held: rows to choose on.
        support: boolean, (groups, features, outputs): the elements that may change; None: all of them.
    """
    before = held.squares / max(held.target, 1e-300)
    best, lowest = None, held.squares
    for damping, update in _updates(fit, DAMPING, support):
        error = held.error(update)
        if error < lowest:
            best, lowest = damping, error
    if best is None:
        return Solution(None, before, before)
    ((_, update),) = _updates(fit.plus(held), (best,), support)
    return Solution(update, before, max(lowest, 0.0) / max(held.target, 1e-300))


def _updates(sums: Sums, dampings: tuple[float, ...], support: Tensor | None) -> Iterator[tuple[float, Tensor]]:
    """The solution for each damping; those that are not finite are left out."""
    diagonal = sums.gram.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    for damping in dampings:
        ridge = torch.diag_embed((damping * scale).unsqueeze(1).expand_as(diagonal))
        update = (
            _dense(sums.gram + ridge, sums.cross) if support is None else masked(sums.gram + ridge, sums.cross, support)
        )
        if update.isfinite().all():
            yield damping, update


def _dense(gram: Tensor, cross: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_ex(gram, cross)[0] if bool(failed.any()) else torch.cholesky_solve(cross, factor)


def masked(gram: Tensor, cross: Tensor, support: Tensor) -> Tensor:
    """Minimize tr(u' gram u) / 2 - tr(u' cross) over updates u that are zero outside of the support.

    Every output has a system of its own, over the features that it keeps. Conjugate gradients solve all of them
    together, preconditioned by the diagonal; each step lowers the error. This is the exact solution that SparseGPT
    (Frantar & Alistarh 2023, arXiv:2301.00774, section 3.1) approximates column by column.

    Shapes: (groups, features, features), (groups, features, outputs), (groups, features, outputs).
    """
    scale = gram.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    update = torch.zeros_like(cross)
    residual = cross * support
    direction = solved = residual / scale
    product = (residual * solved).sum(1, keepdim=True)
    first = product.clone()
    for _ in range(min(ITERATIONS, 2 * gram.shape[1])):
        image = (gram @ direction) * support
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, product / curvature, 0.0)
        update = update + length * direction
        residual = residual - length * image
        solved = residual / scale
        previous, product = product, (residual * solved).sum(1, keepdim=True)
        if bool((product <= PRECISE**2 * first).all()):
            break
        direction = solved + torch.where(previous > 0, product / previous, 0.0) * direction
    return update
