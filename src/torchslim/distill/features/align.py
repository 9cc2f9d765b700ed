"""Alignment of student and teacher features: resizes them to the same positions and projects channels.

A feature of a batch is (batch, channels, *positions): vectors (batch, channels), tokens and signals (batch, channels,
length), maps (batch, channels, height, width), volumes. A mask is (batch, *positions), True where a position counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchslim.errors import DistillError

Shape = tuple[int, ...]
"""The shape of a feature without the batch: (channels, *positions)."""

Masks = tuple[Tensor | None, Tensor | None]
"""Masks of the student's and the teacher's positions, True where a position counts; None if all count."""

AVERAGES: Mapping[int, Callable[..., Tensor]] = {
    1: functional.adaptive_avg_pool1d,
    2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d,
}
MAXIMA: Mapping[int, Callable[..., Tensor]] = {
    1: functional.adaptive_max_pool1d,
    2: functional.adaptive_max_pool2d,
    3: functional.adaptive_max_pool3d,
}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_COVERED = 1e-6


def wide(feature: Tensor) -> Tensor:
    """The feature in at least float32."""
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def check_alignable(student: Shape, teacher: Shape) -> None:
    """Raise DistillError if `align` cannot bring features of these shapes to the same positions."""
    if min(len(student), len(teacher)) < 1 or min(*student, *teacher) < 1 or max(len(student), len(teacher)) > 4:
        reason = "each needs channels and at most three dimensions of positions, none of size 0"
    elif 1 in (len(student), len(teacher)) or len(student) == len(teacher):
        return
    elif 2 in (len(student), len(teacher)):
        tokens, grid = sorted((student[1:], teacher[1:]), key=len)
        if tokens[0] - math.prod(grid) in (0, 1):
            return
        reason = f"{tokens[0]} tokens are not the {math.prod(grid)} positions of {grid}, with or without a class token"
    else:
        reason = "maps and volumes have no positions in common"
    raise DistillError(
        f"a student's feature (channels, *positions) of {student} cannot be brought together with a teacher's of "
        f"{teacher}: {reason}; tap other layers"
    )


def check_positions(name: str, student: Shape, teacher: Shape) -> None:
    """Raise DistillError if `align` cannot align features of these shapes, or leaves no positions of them."""
    check_alignable(student, teacher)
    if 1 in (len(student), len(teacher)):
        raise DistillError(
            f"{name} compares positions, but a student's feature (channels, *positions) of {student} and a teacher's "
            f"of {teacher} have none in common; tap layers whose outputs are maps or tokens, or take Hint"
        )


def check_pairs(pairs: Sequence[tuple[Shape, Shape]]) -> list[tuple[Shape, Shape]]:
    """The pairs as tuples; DistillError if there is none, or one that cannot be aligned."""
    if not pairs:
        raise DistillError("a feature loss needs at least one pair of (student, teacher) shapes, got none; tap layers")
    checked = [(tuple(student), tuple(teacher)) for student, teacher in pairs]
    for pair in checked:
        check_alignable(*pair)
    return checked


def align(student: Tensor, teacher: Tensor, masks: Masks = (None, None)) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both features at the same positions, with 0 where masked, and the mask of these positions.

    Where sizes differ, the student's feature is resized to the teacher's: averaged along dimensions that shrink,
    interpolated along those that grow. If one side is a vector, the other is averaged over its positions. If one side
    is a map or volume, tokens take its positions, without the first (class) token where there is one token more.

    Positions that do not count are left out of every average. After resizing, a position counts if any that counts
    contributes to it, and only if it counts on both sides. Averaging over all positions leaves a mask of samples: True
    for those with any position that counts.

    Shapes: (batch, channels, *positions), (batch, others, *elsewhere), their masks -> (batch, channels, *common),
    (batch, others, *common), (batch, *common) or None.

    Raises:
        DistillError: the positions cannot be aligned, or the numbers of samples differ.
    """
    check_alignable(tuple(student.shape[1:]), tuple(teacher.shape[1:]))
    if len(student) != len(teacher):
        raise DistillError(
            f"student and teacher features are of {len(student)} and {len(teacher)} samples, not the same"
        )
    mask, teacher_mask = (None if side_mask is None else side_mask.bool() for side_mask in masks)
    student, teacher = masked(student, mask), masked(teacher, teacher_mask)
    if student.dim() != teacher.dim():
        if teacher.dim() == 2:
            student, mask = averaged(student, mask)
        elif student.dim() == 2:
            teacher, teacher_mask = averaged(teacher, teacher_mask)
        elif student.dim() == 3:
            student, mask = _on_grid(student, mask, teacher.shape[2:])
        else:
            teacher, teacher_mask = _on_grid(teacher, teacher_mask, student.shape[2:])
    if student.shape[2:] != teacher.shape[2:]:
        student, mask = _resized(student, teacher.shape[2:], mask)
    mask = teacher_mask if mask is None else mask if teacher_mask is None else mask & teacher_mask
    return masked(student, mask), masked(teacher, mask), mask


def resized_mask(mask: Tensor, positions: Sequence[int]) -> Tensor:
    """Mask at other positions, True where any position it covers is: (batch, *elsewhere) -> (batch, *positions)."""
    least = tuple(map(min, mask.shape[1:], positions))
    if least != mask.shape[1:]:
        mask = MAXIMA[len(least)](mask[:, None].float(), least)[:, 0] > 0
    if least != tuple(positions):
        mask = functional.interpolate(mask[:, None].float(), size=tuple(positions), mode="nearest")[:, 0] > 0
    return mask.bool()


def masked(feature: Tensor, mask: Tensor | None) -> Tensor:
    """The feature with 0 where the mask is False: (batch, channels, *positions), (batch, *positions) -> the same."""
    if mask is None:
        return feature
    if mask.shape != feature.shape[:1] + feature.shape[2:]:
        raise DistillError(
            f"a mask of a feature {tuple(feature.shape)} must be (batch, *positions), got {tuple(mask.shape)}"
        )
    return feature.masked_fill(~mask.bool()[:, None], 0)


def mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the values that count, 0 if none does: (batch, *positions), (batch, *positions) or None -> ()."""
    if mask is None:
        return values.mean()
    return values.masked_fill(~mask.bool(), 0).sum() / mask.bool().sum().clamp_min(1)


def pooled(features: Sequence[Tensor]) -> list[Tensor]:
    """Features of one network max-pooled to their smallest size; next to a vector, to one maximum over positions."""
    if any(feature.dim() == 2 for feature in features):
        return [feature.flatten(2).amax(2) if feature.dim() > 2 else feature for feature in features]
    if len({feature.dim() for feature in features}) > 1 or features[0].dim() > 5:
        shapes = " and ".join(str(tuple(feature.shape[1:])) for feature in features)
        raise DistillError(
            f"features (channels, *positions) of one network, {shapes}, have no positions in common; tap layers whose "
            "outputs are alike"
        )
    sizes = [tuple(feature.shape[2:]) for feature in features]
    least = tuple(map(min, *sizes))
    return [
        feature if size == least else MAXIMA[len(least)](feature, least)
        for feature, size in zip(features, sizes, strict=True)
    ]


def averaged(feature: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Mean over the positions that count of a feature that is 0 elsewhere, and a mask of the samples that have any."""
    if mask is None:
        return feature.flatten(2).mean(2), None
    mask = mask.flatten(1)
    return feature.flatten(2).sum(2) / mask.sum(1, keepdim=True).clamp_min(1), mask.any(1)


def _on_grid(tokens: Tensor, mask: Tensor | None, grid: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    first = tokens.shape[2] - math.prod(grid)
    return tokens[:, :, first:].unflatten(2, grid), None if mask is None else mask[:, first:].unflatten(1, grid)


def _resized(feature: Tensor, sizes: Sequence[int], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    sizes = tuple(sizes)

    def resized(tensor: Tensor) -> Tensor:
        least = tuple(map(min, tensor.shape[2:], sizes))
        if least != tensor.shape[2:]:
            tensor = AVERAGES[len(sizes)](tensor, least)
        if least != sizes:
            tensor = functional.interpolate(tensor, size=sizes, mode=MODES[len(sizes)], align_corners=False)
        return tensor

    if mask is None:
        return resized(feature), None
    cover = resized(mask[:, None].to(feature.dtype))
    return resized(feature) / cover.clamp_min(_COVERED), cover[:, 0] > _COVERED


class Project(nn.Module):
    """Learned linear map of the channels at each position, like a 1x1 convolution.

    Shapes: (batch, channels, *positions) -> (batch, wanted, *positions).
    """

    def __init__(self, channels: int, wanted: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, wanted, bias=bias)

    def forward(self, feature: Tensor) -> Tensor:
        """Feature with `wanted` channels at the same positions."""
        projected: Tensor = self.linear(feature.movedim(1, -1)).movedim(-1, 1)
        return projected


def bridge(student: Shape, teacher: Shape) -> nn.Module:
    """`Project` from the student's to the teacher's channels; the identity where both have equally many."""
    return nn.Identity() if student[0] == teacher[0] else Project(student[0], teacher[0])
