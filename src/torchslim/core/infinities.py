"""Compare outputs with infinities and NaN: equal ones in the same place are no difference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def difference(reference: Tensor, value: Tensor) -> Tensor:
    """`reference - value` in float64: 0 where both are the same infinity, or both NaN.

    Shapes: any, the same -> the same.
    """
    left, right = reference.double(), value.double()
    return (left - right).masked_fill(_same(left, right), 0.0)


def energy(reference: Tensor) -> float:
    """Sum of squares of the finite values of `reference`."""
    values = reference.double()
    return float(values.masked_fill(~values.isfinite(), 0.0).square().sum())


def spoiled(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Number of non-finite values in `outputs` that differ from the reference's value in the same place.

    Where the shapes differ from the reference's, every non-finite value counts.
    """
    count = 0
    comparable = [expected.shape for expected in reference] == [output.shape for output in outputs]
    for index, output in enumerate(outputs):
        if output.is_floating_point():
            wrong = ~output.isfinite()
            if comparable and bool(wrong.any()):
                wrong &= ~_same(reference[index].double().to(output.device), output.double())
            count += int(wrong.sum())
    return count


def _same(left: Tensor, right: Tensor) -> Tensor:
    return (left == right) | (torch.isnan(left) & torch.isnan(right))
