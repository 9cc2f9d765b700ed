"""Patterns, which turn a weight's scores into rows of units that compete, and decisions on units into masks.

`units(scores)` has shape (rows, units): within a row the lowest units are removed first. `spread(keep, shape)` turns
the decisions on units into a mask of the weight's shape.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import torch
from torch import Tensor

from torchslim.core.checks import Range, check_fields
from torchslim.errors import PruneError


class Pattern(Protocol):
    """How single weights form units, which are removed or kept together."""

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity that the pattern itself decides, or None."""
        ...

    def refusal(self, shape: torch.Size, input_dim: int) -> str:
        """The reason why a weight of this shape cannot follow the pattern; empty if it can."""
        ...

    def units(self, scores: Tensor, input_dim: int) -> Tensor: ...

    def spread(self, keep: Tensor, shape: torch.Size, input_dim: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Every weight is a unit."""

    fixed_sparsity: ClassVar[None] = None

    def refusal(self, shape: torch.Size, input_dim: int) -> str:
        """Empty: every weight can follow the pattern."""
        return ""

    def units(self, scores: Tensor, input_dim: int) -> Tensor:
        """The scores as one row: (1, n)."""
        return scores.reshape(1, -1)

    def spread(self, keep: Tensor, shape: torch.Size, input_dim: int) -> Tensor:
        """The decisions in the weight's shape."""
        return keep.reshape(shape)


@dataclass(frozen=True, slots=True)
class NM:
    """N of every M consecutive weights along the input dimension are kept (Zhou 2021, arXiv:2102.04010)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise PruneError(f"pattern N:M needs 0 < N < M, got {self.n}:{self.m}")

    @property
    def fixed_sparsity(self) -> float:
        """1 - N / M."""
        return 1 - self.n / self.m

    def refusal(self, shape: torch.Size, input_dim: int) -> str:
        """The reason if the input dimension is no multiple of M; else empty."""
        if not shape:
            return "a single number has no input dimension"
        size = shape[input_dim]
        return "" if size % self.m == 0 else f"input dimension {size} is not a multiple of {self.m}"

    def units(self, scores: Tensor, input_dim: int) -> Tensor:
        """The scores as one row per block: (n / M, M)."""
        return scores.movedim(input_dim, -1).reshape(-1, self.m)

    def spread(self, keep: Tensor, shape: torch.Size, input_dim: int) -> Tensor:
        """The decisions of the blocks in the weight's shape."""
        moved_shape = [size for dim, size in enumerate(shape) if dim != input_dim] + [shape[input_dim]]
        return keep.reshape(moved_shape).movedim(-1, input_dim)


LARGEST_ORDER = 100
"""Finite orders of a norm up to this one; the powers of larger ones leave the range of floats."""

Order = Annotated[float, Range(-math.inf, math.inf, least=1e-30)]
"""The order p of a norm; not too close to 0, because 1 / p is an exponent."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Whole slices along `dim`, ranked by the L_n norm of their scores, as `ln_structured` ranks them."""

    n: Order = 2.0
    dim: int = 0
    fixed_sparsity: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_fields(self, PruneError)
        if LARGEST_ORDER < abs(self.n) < math.inf:
            raise PruneError(
                f"n must be at most {LARGEST_ORDER} in size, or infinite, got {self.n}: powers of larger orders are "
                "all 0 or infinite; use inf for the largest value"
            )

    def refusal(self, shape: torch.Size, input_dim: int) -> str:
        """The reason if the weight lacks the dimension, or has no other; else empty."""
        if len(shape) < 2:
            return "a weight of one dimension has no slices"
        return (
            "" if -len(shape) <= self.dim < len(shape) else f"a weight of {len(shape)} dimensions has no dim {self.dim}"
        )

    def units(self, scores: Tensor, input_dim: int) -> Tensor:
        """The norms of the slices as one row: (1, slices)."""
        norms: Tensor = torch.linalg.vector_norm(scores.movedim(self.dim, 0).flatten(1), ord=self.n, dim=1)
        return norms.unsqueeze(0)

    def spread(self, keep: Tensor, shape: torch.Size, input_dim: int) -> Tensor:
        """The decisions of the slices, expanded to the weight's shape."""
        view = [1] * len(shape)
        view[self.dim] = -1
        return keep.reshape(view).expand(shape).clone()


CHANNEL, BLOCK = "channel", "block"

PATTERNS = {
    "unstructured": "single weights",
    "slice": "whole slices along `dim`, by their L_`n` norm",
    "N:M": "N of every M weights along the input dimension are kept: 2:4, 4:8",
    CHANNEL: "whole channels, neurons and heads, physically removed",
    BLOCK: "whole residual blocks, physically removed",
}


def find_pattern(pattern: str, *, n: float = 2.0, dim: int = 0) -> Pattern:
    """The pattern named "unstructured", "slice" (with `n` and `dim`), or "N:M"."""
    if pattern == "unstructured":
        return Unstructured()
    if pattern == "slice":
        return Slice(n, dim)
    if numbers := re.fullmatch(r"(\d+):(\d+)", pattern):
        return NM(int(numbers[1]), int(numbers[2]))
    if pattern in (CHANNEL, BLOCK):
        raise PruneError(
            f"pattern {pattern!r} removes no single weights; use ts.prune.{pattern}s(model, example_inputs, ...)"
        )
    raise PruneError(f"pattern {pattern!r} is not known; one of {', '.join(PATTERNS)}")
