"""Feature losses: frozen dataclasses that compare hidden layers of student and teacher.

A feature of a batch is (batch, channels, *positions), its shape (channels, *positions). A loss builds a module that
trains jointly with the student and is discarded afterwards; it stays in float32 whatever the student's precision.

>>> import torch
>>> module = Hint().build([((8, 6, 6), (16, 3, 3))])
>>> module([torch.randn(2, 8, 6, 6)], [torch.randn(2, 16, 3, 3)]).shape
torch.Size([])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchslim.core.checks import Divisor, check_fields
from torchslim.distill.features.align import (
    Masks,
    Project,
    Shape,
    align,
    bridge,
    check_alignable,
    check_pairs,
    check_positions,
    masked,
    wide,
)
from torchslim.distill.given import check_features
from torchslim.distill.losses.feature_formulas import (
    attention_transfer,
    cosine,
    flow,
    fsp,
    hint,
    variational_information,
)
from torchslim.distill.losses.response import check_positive
from torchslim.errors import DistillError

Compare = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A loss of a student's feature, a teacher's feature and a mask."""


# ----------------------------------------------------------------------------------------------------------------------


class FeatureModule(nn.Module):
    """Base of the modules: weight * mean over the pairs, in the precision of their parameters, outside autocast."""

    def __init__(self, weight: float, pairs: Sequence[tuple[Shape, Shape]]) -> None:
        super().__init__()
        self.weight = weight
        self.channels = [(student[0], teacher[0]) for student, teacher in pairs]

    def forward(
        self, students: Sequence[Tensor], teachers: Sequence[Tensor], masks: Sequence[Masks] | None = None
    ) -> Tensor:
        """Weighted loss of features (batch, channels, *positions) and masks (batch, *positions) for each pair -> ()."""
        masks = [(None, None)] * len(students) if masks is None else masks
        if any(isinstance(mask, Tensor) for mask in masks):
            raise DistillError("masks are pairs: one for the student's positions and one for the teacher's, or None")
        got = [(student.shape[1], teacher.shape[1]) for student, teacher in zip(students, teachers, strict=False)]
        if got != self.channels or not len(students) == len(teachers) == len(masks):
            raise DistillError(
                f"built for pairs of (student, teacher) channels {self.channels}, got {len(students)} features of the "
                f"student, {len(teachers)} of the teacher and {len(masks)} masks, of channels {got}; build a new one"
            )
        parameter = next(self.parameters(), None)
        tensors = [
            [wide(feature) if parameter is None else feature.to(parameter.dtype) for feature in side]
            for side in (students, [teacher.detach() for teacher in teachers])
        ]
        # a sum of many squares overflows in half precision
        with torch.autocast(students[0].device.type, enabled=False):
            return self.weight * torch.stack(self.terms(tensors[0], tensors[1], masks)).mean()

    def terms(self, students: list[Tensor], teachers: list[Tensor], masks: Sequence[Masks]) -> list[Tensor]:
        """Losses as scalars, whose mean `forward` takes."""
        raise NotImplementedError


class _Apart(FeatureModule):
    """Compares every pair by itself, with its own part."""

    def __init__(self, weight: float, pairs: Sequence[tuple[Shape, Shape]], parts: Sequence[nn.Module]) -> None:
        super().__init__(weight, pairs)
        self.parts = nn.ModuleList(parts)

    def terms(self, students: list[Tensor], teachers: list[Tensor], masks: Sequence[Masks]) -> list[Tensor]:
        return [part(*pair) for part, *pair in zip(self.parts, students, teachers, masks, strict=True)]


class _Compared(nn.Module):
    """Brings the student's feature to the teacher's positions, then to its channels, then compares both."""

    def __init__(self, compare: Compare, projector: nn.Module) -> None:
        super().__init__()
        self.compare, self.projector = compare, projector

    def forward(self, student: Tensor, teacher: Tensor, masks: Masks) -> Tensor:
        student, teacher, mask = align(student, teacher, masks)
        return self.compare(self.projector(student), teacher, mask)


class _Attention(nn.Module):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, student: Tensor, teacher: Tensor, masks: Masks) -> Tensor:
        return attention_transfer(student, teacher, self.power, masks)


class _Flows(FeatureModule):
    """Compares the flows between consecutive pairs. Masked positions count as 0."""

    def __init__(self, weight: float, pairs: Sequence[tuple[Shape, Shape]]) -> None:
        super().__init__(weight, pairs)
        self.projectors = nn.ModuleList(bridge(*pair) for pair in pairs)

    def terms(self, students: list[Tensor], teachers: list[Tensor], masks: Sequence[Masks]) -> list[Tensor]:
        for index, (student_mask, teacher_mask) in enumerate(masks):
            teachers[index] = masked(teachers[index], teacher_mask)
            students[index] = masked(self.projectors[index](masked(students[index], student_mask)), student_mask)
        return [fsp(student, teacher) for student, teacher in zip(pairwise(students), pairwise(teachers), strict=True)]


class _Variational(nn.Module):
    """Gaussian of the teacher's feature; its mean is computed from the student's feature."""

    least_variance = 1e-5

    def __init__(self, channels: int, teacher_channels: int, variance: float) -> None:
        super().__init__()
        sizes = [channels, teacher_channels, teacher_channels, teacher_channels]
        layers = [Project(inputs, outputs, bias=False) for inputs, outputs in pairwise(sizes)]
        self.regressor = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.alpha = nn.Parameter(torch.full((teacher_channels,), variance + math.log(-math.expm1(-variance))))

    def forward(self, student: Tensor, teacher: Tensor, masks: Masks) -> Tensor:
        student, teacher, mask = align(student, teacher, masks)
        variance = functional.softplus(self.alpha) + self.least_variance
        return variational_information(self.regressor(student), variance, teacher, mask)


# ----------------------------------------------------------------------------------------------------------------------


class FeatureLoss:
    """Base of the feature losses: builds a module for given shapes; a loss without weights can be called directly."""

    written = "Hint(...)"  # how messages name it

    weight: float

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """Module that computes the loss for pairs of (student, teacher) shapes, (channels, *positions).

        The module takes the student's features, the teacher's features and masks, one for each pair, and returns the
        weighted mean over the pairs. Its weights are drawn from torch's default generator.

        Raises:
            DistillError: the shapes of a pair cannot be brought together.
        """
        raise NotImplementedError

    def __call__(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """Loss of one feature, or of equally many: (batch, channels, *positions), (batch, others, *elsewhere) -> ()."""
        check_features(student=student, teacher=teacher)
        students, teachers = ([side] if isinstance(side, Tensor) else list(side) for side in (student, teacher))
        if len(students) != len(teachers):
            raise DistillError(f"{len(students)} features of the student, {len(teachers)} of the teacher; give pairs")
        shapes = [
            (tuple(ours.shape[1:]), tuple(theirs.shape[1:])) for ours, theirs in zip(students, teachers, strict=True)
        ]
        module = self.build(shapes)
        if next(module.parameters(), None) is not None:
            raise DistillError(
                f"{type(self).__name__} of shapes {shapes} learns with the student, so its weights must be kept and "
                "trained: use build(...), or Distill(feature=...)"
            )
        loss: Tensor = module(students, teachers)
        return loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint(FeatureLoss):
    """weight * mean squared difference of the teacher's feature and a learned linear map of the student's.

    The regressor maps channels at each position, also where student and teacher have equally many; that of FitNets may
    span positions.

    Args:
        weight: 100 in the comparison of Tian et al. 2020, arXiv:1910.10699; in `benchmarks/distill.py` the regressor
            then diverged at a learning rate of 0.1, and 10 was better than 1 on validation.

    Source: Romero et al. 2015 (FitNets), arXiv:1412.6550, section 2.2, eq. 3.
    """

    weight: float = 10.0

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """Module with a regressor for each pair."""
        pairs = check_pairs(pairs)
        return _Apart(
            self.weight, pairs, [_Compared(hint, Project(student[0], teacher[0])) for student, teacher in pairs]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMSE(FeatureLoss):
    """weight * mean squared difference at each position, of any layout, after a learned linear map where widths differ.

    Source: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, eq. 8, whose weight is 1 and which always has the map.
    """

    weight: float = 1.0

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """Module with a linear map for each pair."""
        pairs = check_pairs(pairs)
        return _Apart(self.weight, pairs, [_Compared(hint, bridge(*pair)) for pair in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCosine(FeatureLoss):
    """weight * (1 - cosine) at each position, of any layout, after a learned linear map where widths differ.

    Source: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 2; the weight is that of the released training.
    """

    weight: float = 1.0

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """Module with a linear map for each pair."""
        pairs = check_pairs(pairs)
        return _Apart(self.weight, pairs, [_Compared(cosine, bridge(*pair)) for pair in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTransfer(FeatureLoss):
    """weight * attention_transfer; it learns nothing. Features need positions.

    Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928, section 3.1; the weight is their 1000 of the mean square.
    """

    weight: float = 1000.0
    power: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)
        if not 1 <= self.power < math.inf:  # below 1 the gradient at 0 is undefined
            raise DistillError(f"power must be a finite number of at least 1, got {self.power}")

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """Module without weights."""
        pairs = check_pairs(pairs)
        for pair in pairs:
            check_positions("AttentionTransfer", *pair)
        return _Apart(self.weight, pairs, [_Attention(self.power) for _ in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class FSP(FeatureLoss):
    """weight * fsp, mean over consecutive pairs of layers, at least two, shallow ones first.

    Unlike in the paper, a learned linear map brings the student to the teacher's channels where they differ.
    Positions of student and teacher may differ.

    Source: Yim et al. 2017, "A Gift from Knowledge Distillation", CVPR, section 3; the weight is that of the comparison
    in Tian et al. 2020, arXiv:1910.10699.
    """

    weight: float = 50.0

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """Module with a linear map for each pair."""
        if len(pairs) < 2:
            raise DistillError(f"FSP compares flows between layers, so it needs at least two pairs, got {len(pairs)}")
        for side in zip(*pairs, strict=True):
            for shape in side:
                check_alignable(shape, shape)
            for first, second in pairwise(side):
                flow(torch.empty(1, *first, device="meta"), torch.empty(1, *second, device="meta"))
        return _Flows(self.weight, [(tuple(student), tuple(teacher)) for student, teacher in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class VID(FeatureLoss):
    """weight * variational_information: negative log-likelihood of the teacher's feature given the student's.

    The mean is learned by three linear maps of the channels at each position, ReLU between them; the variance of each
    channel is softplus(alpha) + 1e-5, also learned. The loss may be negative.

    Args:
        weight: that of the comparison in Tian et al. 2020, arXiv:1910.10699.
        variance: at the start of training; 5 in the released code.

    Source: Ahn et al. 2019, arXiv:1904.05835, section 2, eq. 4-6; the regressor is that of their released code.
    """

    weight: float = 1.0
    variance: Divisor = 5.0

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)
        check_positive("variance", self.variance)

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """Module with the mean and variance for each pair."""
        pairs = check_pairs(pairs)
        return _Apart(
            self.weight, pairs, [_Variational(student[0], teacher[0], self.variance) for student, teacher in pairs]
        )
