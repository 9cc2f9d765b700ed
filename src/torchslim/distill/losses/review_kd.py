"""Knowledge review: the student's shallow features, fused with its deeper ones, learn from the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchslim.distill.features.align import AVERAGES, Masks, Shape, align, check_pairs, masked, wide
from torchslim.distill.losses.feature import FeatureLoss, FeatureModule
from torchslim.errors import DistillError

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features and of their averages over grids of 4, 2 and 1, with weights halved in turn.

    The weights sum to 1. A grid is left out where the feature is no larger.

    Shapes: (batch, channels, *positions), the same -> (). Source: Chen et al. 2021, arXiv:2104.09044, section 3.3,
    with the levels of their released code.
    """
    positions = tuple(student.shape[2:])
    if student.shape != teacher.shape or len(positions) not in AVERAGES:
        raise DistillError(
            f"hierarchical context compares features (batch, channels, *positions) of one shape, with one to three "
            f"dimensions of positions, got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "ReviewKD().build(...) brings them together"
        )
    student, teacher = wide(student), wide(teacher.detach())
    losses, weights = [functional.mse_loss(student, teacher)], [1.0]
    for level in (4, 2, 1):
        grid = tuple(min(level, size) for size in positions)
        if grid != positions:
            pool = AVERAGES[len(grid)]
            losses.append(functional.mse_loss(pool(student, grid), pool(teacher, grid)))
            weights.append(weights[-1] / 2)
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


class _Norm(nn.BatchNorm1d):
    """Batch norm over any dimensions of positions; a single value, which has no variance, uses running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        training = self.training and input.numel() > input.shape[1]
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps
        )


class _Fusion(nn.Module):
    """Attention-based fusion of a student's feature with the fused one of the next deeper layer."""

    def __init__(self, rank: int, channels: int, middle: int, teacher_channels: int, *, deepest: bool) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[rank]
        self.inward = nn.Sequential(convolution(channels, middle, 1, bias=False), _Norm(middle))
        self.outward = nn.Sequential(
            convolution(middle, teacher_channels, 3, padding=1, bias=False), _Norm(teacher_channels)
        )
        for branch in (self.inward, self.outward):
            nn.init.kaiming_uniform_(next(branch.parameters()), a=1)
        self.gates = None if deepest else convolution(2 * middle, 2, 1)

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """The feature to compare with the teacher, and the one that the next shallower layer fuses."""
        fused = self.inward(feature)
        if self.gates is not None and deeper is not None:
            deeper = functional.interpolate(deeper, size=fused.shape[2:], mode="nearest")
            gates = self.gates(torch.cat([fused, deeper], 1)).sigmoid()
            fused = fused * gates[:, :1] + deeper * gates[:, 1:]
        return self.outward(fused), fused


class _Review(FeatureModule):
    """Fuses from the deepest pair to the shallowest. Masked positions count as 0; a vector is a map of one position."""

    def __init__(self, weight: float, pairs: Sequence[tuple[Shape, Shape]], rank: int, middle: int) -> None:
        super().__init__(weight, pairs)
        self.rank = rank
        self.fusions = nn.ModuleList(
            _Fusion(rank, student[0], middle, teacher[0], deepest=index == len(pairs) - 1)
            for index, (student, teacher) in enumerate(pairs)
        )

    def terms(self, students: list[Tensor], teachers: list[Tensor], masks: Sequence[Masks]) -> list[Tensor]:
        losses, fused = [], None
        for index in reversed(range(len(students))):
            student, teacher, mask = align(students[index], teachers[index], masks[index])
            if student.dim() == 2:
                grid = (1,) * self.rank
                student, teacher = (vector.unflatten(1, (-1, *grid)) for vector in (student, teacher))
                mask = None if mask is None else mask.view(-1, *grid)
            compared, fused = self.fusions[index](student, fused)
            losses.append(hierarchical_context(masked(compared, mask), teacher))
        return losses


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewKD(FeatureLoss):
    """weight * hierarchical_context, mean over the pairs, of the student's features fused with all deeper ones.

    Pairs come shallow first. Features need positions, with equally many dimensions in all pairs; a vector counts as a
    map of one position. The student's features are resized to the teacher's before the fusion, in the paper after it.
    The paper sums over the pairs.

    Args:
        weight: between 0.6 and 5 in the paper, depending on the networks.
        channels: largest number of fused channels; fewer if the deepest student feature has fewer. 512 in the released
            code.

    Source: Chen et al. 2021, arXiv:2104.09044, section 3.
    """

    weight: float = 1.0
    channels: int = 512

    def __post_init__(self) -> None:
        FeatureLoss.__post_init__(self)
        if not isinstance(self.channels, int) or self.channels < 1:
            raise DistillError(f"channels must be a whole number of at least 1, got {self.channels!r}")

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """Module with a fusion for each pair."""
        pairs = check_pairs(pairs)
        ranks = {max(map(len, pair)) - 1 for pair in pairs if min(map(len, pair)) > 1}
        if len(ranks) != 1:
            got = "none" if not ranks else " and ".join(map(str, sorted(ranks)))
            raise DistillError(
                f"ReviewKD fuses features with as many dimensions of positions, got {got} in the pairs of (student, "
                f"teacher) shapes {pairs}; tap layers whose outputs are all maps, or all tokens"
            )
        return _Review(self.weight, pairs, ranks.pop(), min(self.channels, pairs[-1][0][0]))
