"""A student's and a teacher's features brought together: the same positions, the same channels.

A feature of a batch is (batch, channels, *positions): vectors (batch, channels), tokens and signals (batch, channels,
length), maps (batch, channels, height, width), volumes. A mask is (batch, *positions), True where one counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchslim.errors import DistillError

Shape = tuple[int, ...]
"""Of a feature, without the batch: (channels, *positions)."""

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
    """In at least float32."""
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def check_alignable(student: Shape, teacher: Shape) -> None:
    """Raise DistillError where `align` could not bring features of these shapes to the same positions."""
    if min(len(student), len(teacher)) < 1 or min(*student, *teacher) < 1 or max(len(student), len(teacher)) > 4:
        reason = "each needs channels and at most three dimensions of positions, none of size 0"
    elif 1 in (len(student), len(teacher)) or len(student) == len(teacher):
        return
    elif 2 in (len(student), len(teacher)):
        tokens, grid = sorted((student[1:], teacher[1:]), key=len)
        if tokens[0] - math.prod(grid) in (0, 1):
            return
        reason = f"{tokens[0]} tokens are neither the {math.prod(grid)} positions of {grid} nor one class token more"
    else:
        reason = "maps and volumes have no positions in common"
    raise DistillError(
        f"a student's feature (channels, *positions) of {student} cannot be brought together with a teacher's of "
        f"{teacher}: {reason}; tap other layers"
    )


def check_positions(name: str, student: Shape, teacher: Shape) -> None:
    """Raise DistillError where `align` would leave no positions of features of these shapes."""
    check_alignable(student, teacher)
    if 1 in (len(student), len(teacher)):
        raise DistillError(
            f"{name} compares positions, but a student's feature (channels, *positions) of {student} and a teacher's "
            f"of {teacher} have none in common; tap layers whose outputs are maps or tokens, or take Hint"
        )


def check_pairs(pairs: Sequence[tuple[Shape, Shape]]) -> list[tuple[Shape, Shape]]:
    """The pairs as tuples; DistillError where there is none, or one cannot be brought together."""
    if not pairs:
        raise DistillError("a feature loss needs at least one pair of (student, teacher) shapes, got none; tap layers")
    checked = [(tuple(student), tuple(teacher)) for student, teacher in pairs]
    for pair in checked:
        check_alignable(*pair)
    return checked


def align(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both features at the same positions, and the mask there; what is masked is 0 in both.

    Of different sizes, the student's is resized to the teacher's: averaged along a dimension that shrinks,
    interpolated along one that grows. Next to a vector the other is averaged over its positions. Next to a map or
    volume, tokens take its positions, without the first (class) token where there is one more of them.

    The mask is of the student's positions and goes with them; a position counts if one that counts has a part in it,
    and those that do not count have no part. Averaged positions leave a mask of samples: those with any that count.
    Positions of the teacher that are averaged all count.

    Shapes: (batch, channels, *positions), (batch, others, *elsewhere), (batch, *positions) or None -> (batch,
    channels, *common), (batch, others, *common), (batch, *common) or None.

    Raises:
        DistillError: the positions have nothing in common.
    """
    check_alignable(tuple(student.shape[1:]), tuple(teacher.shape[1:]))
    if len(student) != len(teacher):
        raise DistillError(
            f"student and teacher features are of {len(student)} and {len(teacher)} samples, not the same"
        )
    if mask is not None:
        mask = mask.bool()
        student = masked(student, mask)
    if student.dim() != teacher.dim():
        if teacher.dim() == 2:
            student, mask = _averaged(student, mask)
        elif student.dim() == 2:
            teacher, _ = _averaged(teacher, None)
        elif student.dim() == 3:
            grid = teacher.shape[2:]
            student = _on_grid(student, grid)
            mask = None if mask is None else _on_grid(mask[:, None], grid)[:, 0]
        else:
            teacher = _on_grid(teacher, student.shape[2:])
    if student.shape[2:] != teacher.shape[2:]:
        student, mask = _resized(student, teacher.shape[2:], mask)
    return masked(student, mask), masked(teacher, mask), mask


def masked(feature: Tensor, mask: Tensor | None) -> Tensor:
    """The feature with 0 where the mask is False: (batch, channels, *positions), (batch, *positions) -> the same."""
    if mask is None:
        return feature
    if mask.shape != feature.shape[:1] + feature.shape[2:]:
        raise DistillError(
            f"a mask is (batch, *positions) of the student's feature, which is {tuple(feature.shape)}; got "
            f"{tuple(mask.shape)}"
        )
    return feature.masked_fill(~mask.bool()[:, None], 0)


def mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of what counts, 0 where nothing does: (batch, *positions), (batch, *positions) or None -> ()."""
    if mask is None:
        return values.mean()
    return values.masked_fill(~mask.bool(), 0).sum() / mask.bool().sum().clamp_min(1)


def pooled(features: Sequence[Tensor]) -> list[Tensor]:
    """Features of one network max-pooled to the smallest of their sizes; next to a vector, maxima over positions."""
    if any(each.dim() == 2 for each in features):
        return [each.flatten(2).amax(2) if each.dim() > 2 else each for each in features]
    if len({each.dim() for each in features}) > 1 or features[0].dim() > 5:
        shapes = " and ".join(str(tuple(each.shape[1:])) for each in features)
        raise DistillError(
            f"features (channels, *positions) of one network, {shapes}, have no positions in common; tap layers whose "
            "outputs are alike"
        )
    sizes = [tuple(each.shape[2:]) for each in features]
    least = tuple(map(min, *sizes))
    return [
        each if size == least else MAXIMA[len(least)](each, least) for each, size in zip(features, sizes, strict=True)
    ]


def _averaged(feature: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if mask is None:
        return feature.flatten(2).mean(2), None
    mask = mask.flatten(1)
    return feature.flatten(2).sum(2) / mask.sum(1, keepdim=True).clamp_min(1), mask.any(1)


def _on_grid(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    return tokens[:, :, tokens.shape[2] - math.prod(grid) :].reshape(*tokens.shape[:2], *grid)


def _resized(feature: Tensor, wanted: Sequence[int], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    wanted = tuple(wanted)

    def resized(each: Tensor) -> Tensor:
        least = tuple(map(min, each.shape[2:], wanted))
        if least != each.shape[2:]:
            each = AVERAGES[len(wanted)](each, least)
        if least != wanted:
            each = functional.interpolate(each, size=wanted, mode=MODES[len(wanted)], align_corners=False)
        return each

    if mask is None:
        return resized(feature), None
    cover = resized(mask[:, None].to(feature.dtype))
    return resized(feature) / cover.clamp_min(_COVERED), cover[:, 0] > _COVERED


class Project(nn.Module):
    """A learned linear map of the channels at each position, as a 1x1 convolution is.

    Shapes: (batch, channels, *positions) -> (batch, wanted, *positions).
    """

    def __init__(self, channels: int, wanted: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, wanted, bias=bias)

    def forward(self, feature: Tensor) -> Tensor:
        """The same positions with other channels."""
        projected: Tensor = self.linear(feature.movedim(1, -1)).movedim(-1, 1)
        return projected


def bridge(student: Shape, teacher: Shape) -> nn.Module:
    """Project from the student's to the teacher's channels; nothing to learn where there are as many."""
    return nn.Identity() if student[0] == teacher[0] else Project(student[0], teacher[0])
