"""Feature losses, or hints: what is learned from hidden layers. Frozen dataclasses, and plain functions of features.

A feature of a batch is (batch, channels, *positions), its shape (channels, *positions). A loss builds a module that
trains along with the student and is thrown away afterwards; it stays in float32 whatever the student's precision.

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
    mean_over,
    pooled,
    wide,
)
from torchslim.distill.given import check_features
from torchslim.distill.losses.response import check_positive
from torchslim.distill.ruled_out import comparable
from torchslim.errors import DistillError

Compare = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of a student's feature, a teacher's and a mask."""


def hint(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over the batch, channels and the positions that count.

    Shapes: (batch, channels, *positions), the same, (batch, *positions) or None -> ().
    Source: Romero et al. 2015 (FitNets), arXiv:1412.6550, section 2.2, eq. 3, which is half of the sum; Jiao et al.
    2020 (TinyBERT), arXiv:1909.10351, eq. 8.
    """
    student, teacher = _alike(student, teacher, mask)
    return mean_over((student - teacher).square().mean(1), mask)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the positions that count of 1 - cosine, of the channels at each.

    Shapes: (batch, channels, *positions), the same, (batch, *positions) or None -> ().
    Source: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 2.
    """
    student, teacher = _alike(student, teacher, mask)
    return mean_over(1 - functional.cosine_similarity(student, teacher, dim=1), mask)


def attention(feature: Tensor, power: float = 2) -> Tensor:
    """Where a network looks, the sum over channels of |A|^power: (batch, channels, *positions) -> (batch, *positions).

    Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928, section 3.1, F_sum^p.
    """
    return wide(feature).abs().pow(power).sum(1)


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2, masks: Masks = (None, None)) -> Tensor:
    """Mean squared difference of the attention maps, each sample's flattened and divided by its l2 norm.

    The mean is over the batch and the positions that count, as their released code has it; their eq. 2 is the norm of
    the difference. Channels may differ; of other sizes, the student's attention map is resized.

    Shapes: (batch, channels, *positions), (batch, others, *elsewhere), their masks -> ().
    Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928, section 3.1.
    """
    check_positions("attention transfer", tuple(student.shape[1:]), tuple(teacher.shape[1:]))
    left, right = (
        attention(masked(*each), power)[:, None] for each in zip((student, teacher.detach()), masks, strict=True)
    )
    left, right, mask = align(left, right, masks)
    left, right = (functional.normalize(each.flatten(1), dim=1) for each in (left, right))
    return mean_over((left - right).square(), None if mask is None else mask.flatten(1))


def flow(first: Tensor, second: Tensor) -> Tensor:
    """How one layer's channels go with a later one's: mean over positions of the product of each pair of channels.

    The larger is max-pooled to the size of the smaller.

    Shapes: (batch, channels, *positions), (batch, others, *elsewhere) -> (batch, channels, others).
    Source: Yim et al. 2017, "A Gift from Knowledge Distillation", CVPR, section 3.2, eq. 1.
    """
    left, right = (each.reshape(*each.shape[:2], -1) for each in pooled([wide(first), wide(second)]))
    return left @ right.mT / left.shape[2]


def fsp(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared difference of the flows between two layers of the student and two of the teacher.

    The mean is over the batch and all pairs of channels, where the paper's is the sum over these.

    Shapes: two of (batch, channels, *positions), two with the same channels and any positions -> ().
    Source: Yim et al. 2017, "A Gift from Knowledge Distillation", CVPR, section 3.3, eq. 2.
    """
    left, right = flow(*student), flow(*(each.detach() for each in teacher))
    if left.shape != right.shape:
        raise DistillError(
            f"flows (batch, channels, channels) of the student {tuple(left.shape)} and of the teacher "
            f"{tuple(right.shape)} differ; FSP().build(...) learns a projection"
        )
    return functional.mse_loss(left, right)


def variational_information(mean: Tensor, variance: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch, channels and positions of -log q(teacher | student), a Gaussian's, without the constant.

    log(sigma) + (teacher - mean)^2 / (2 sigma^2), with a variance for each channel.

    Shapes: (batch, channels, *positions), (channels,), that of the mean, (batch, *positions) or None -> ().
    Source: Ahn et al. 2019, arXiv:1904.05835, section 2, eq. 4-6.
    """
    mean, teacher = _alike(mean, teacher, mask)
    variance = variance.view(-1, *[1] * (mean.dim() - 2))
    return mean_over((variance.log() + (teacher - mean).square() / variance).mean(1) / 2, mask)


def _alike(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in at least float32, 0 where masked, the teacher without gradient."""
    if student.shape != teacher.shape or student.dim() < 2:
        raise DistillError(
            f"features (batch, channels, *positions) of the student {tuple(student.shape)} and of the teacher "
            f"{tuple(teacher.shape)} differ; build(...) of a feature loss brings them together"
        )
    return comparable(masked(wide(student), mask), masked(wide(teacher.detach()), mask))


# ----------------------------------------------------------------------------------------------------------------------


class FeatureModule(nn.Module):
    """What the modules share: weight * mean over the pairs, in the precision of their parameters, outside autocast."""

    def __init__(self, weight: float, pairs: Sequence[tuple[Shape, Shape]]) -> None:
        super().__init__()
        self.weight = weight
        self.channels = [(student[0], teacher[0]) for student, teacher in pairs]

    def forward(
        self, students: Sequence[Tensor], teachers: Sequence[Tensor], masks: Sequence[Masks] | None = None
    ) -> Tensor:
        """Features (batch, channels, *positions), and the masks of each pair, (batch, *positions) -> ()."""
        masks = [(None, None)] * len(students) if masks is None else masks
        if any(isinstance(mask, Tensor) for mask in masks):
            raise DistillError("masks are pairs: one for the student's positions and one for the teacher's, or None")
        got = [(left.shape[1], right.shape[1]) for left, right in zip(students, teachers, strict=False)]
        if got != self.channels or not len(students) == len(teachers) == len(masks):
            raise DistillError(
                f"built for pairs of (student, teacher) channels {self.channels}, got {len(students)} features of the "
                f"student, {len(teachers)} of the teacher and {len(masks)} masks, of channels {got}; build it anew"
            )
        parameter = next(self.parameters(), None)
        tensors = [
            [wide(each) if parameter is None else each.to(parameter.dtype) for each in side]
            for side in (students, [teacher.detach() for teacher in teachers])
        ]
        # a loss of many squares overflows in half precision
        with torch.autocast(students[0].device.type, enabled=False):
            return self.weight * torch.stack(self.terms(tensors[0], tensors[1], masks)).mean()

    def terms(self, students: list[Tensor], teachers: list[Tensor], masks: Sequence[Masks]) -> list[Tensor]:
        """One scalar for each pair."""
        raise NotImplementedError


class _Apart(FeatureModule):
    """Each pair is compared on its own, by its part."""

    def __init__(self, weight: float, pairs: Sequence[tuple[Shape, Shape]], parts: Sequence[nn.Module]) -> None:
        super().__init__(weight, pairs)
        self.parts = nn.ModuleList(parts)

    def terms(self, students: list[Tensor], teachers: list[Tensor], masks: Sequence[Masks]) -> list[Tensor]:
        return [part(*each) for part, *each in zip(self.parts, students, teachers, masks, strict=True)]


class _Compared(nn.Module):
    """Brought to the teacher's positions, then to its channels, then compared."""

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
    """Flows between consecutive pairs. Masked positions count as 0."""

    def __init__(self, weight: float, pairs: Sequence[tuple[Shape, Shape]]) -> None:
        super().__init__(weight, pairs)
        self.projectors = nn.ModuleList(bridge(*pair) for pair in pairs)

    def terms(self, students: list[Tensor], teachers: list[Tensor], masks: Sequence[Masks]) -> list[Tensor]:
        for index, (mask, other) in enumerate(masks):
            teachers[index] = masked(teachers[index], other)
            students[index] = masked(self.projectors[index](masked(students[index], mask)), mask)
        return [fsp(left, right) for left, right in zip(pairwise(students), pairwise(teachers), strict=True)]


class _Variational(nn.Module):
    """A Gaussian of the teacher's feature whose mean the student's gives."""

    least_variance = 1e-5

    def __init__(self, channels: int, wanted: int, variance: float) -> None:
        super().__init__()
        sizes = [channels, wanted, wanted, wanted]
        layers = [Project(have, want, bias=False) for have, want in pairwise(sizes)]
        self.regressor = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.alpha = nn.Parameter(torch.full((wanted,), variance + math.log(-math.expm1(-variance))))

    def forward(self, student: Tensor, teacher: Tensor, masks: Masks) -> Tensor:
        student, teacher, mask = align(student, teacher, masks)
        variance = functional.softplus(self.alpha) + self.least_variance
        return variational_information(self.regressor(student), variance, teacher, mask)


# ----------------------------------------------------------------------------------------------------------------------


class FeatureLoss:
    """What the feature losses share: they build a module for shapes; one that learns nothing can be called at once."""

    written = "Hint(...)"  # how messages name it

    weight: float

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """What is learned with it, sized for these pairs of (student, teacher) shapes, (channels, *positions).

        The module takes features of the students, of the teachers, and masks, one for each pair, to the weighted mean
        over the pairs. Its weights are drawn from torch's own generator.

        Raises:
            DistillError: the shapes of a pair cannot be brought together.
        """
        raise NotImplementedError

    def __call__(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """Of a feature each, or of as many: (batch, channels, *positions), (batch, others, *elsewhere) -> ()."""
        check_features(student=student, teacher=teacher)
        students, teachers = ([each] if isinstance(each, Tensor) else list(each) for each in (student, teacher))
        if len(students) != len(teachers):
            raise DistillError(f"{len(students)} features of the student, {len(teachers)} of the teacher; give pairs")
        shapes = [
            (tuple(left.shape[1:]), tuple(right.shape[1:])) for left, right in zip(students, teachers, strict=True)
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

    The regressor maps channels at each position, also where there are as many; FitNets' may span positions.

    Args:
        weight: 100 in the comparison of Tian et al. 2020, arXiv:1910.10699; beside a learning rate of 0.1 the regressor
            then diverged in `benchmarks/distill.py`, where 10 was better than 1 on validation.

    Source: Romero et al. 2015 (FitNets), arXiv:1412.6550, section 2.2, eq. 3.
    """

    weight: float = 10.0

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """The regressors."""
        pairs = check_pairs(pairs)
        return _Apart(self.weight, pairs, [_Compared(hint, Project(left[0], right[0])) for left, right in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMSE(FeatureLoss):
    """weight * mean squared difference at each position, of any layout, after a learned linear map where widths differ.

    Source: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, eq. 8, whose weight is 1 and which always has the map.
    """

    weight: float = 1.0

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """The linear maps."""
        pairs = check_pairs(pairs)
        return _Apart(self.weight, pairs, [_Compared(hint, bridge(*pair)) for pair in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCosine(FeatureLoss):
    """weight * (1 - cosine) at each position, of any layout, after a learned linear map where widths differ.

    Source: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 2; the weight is that of their released training.
    """

    weight: float = 1.0

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """The linear maps."""
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
        if not 1 <= self.power < math.inf:  # below, the gradient at 0 is none
            raise DistillError(f"power must be a finite number of at least 1, got {self.power}")

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """Nothing to learn."""
        pairs = check_pairs(pairs)
        for pair in pairs:
            check_positions("AttentionTransfer", *pair)
        return _Apart(self.weight, pairs, [_Attention(self.power) for _ in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class FSP(FeatureLoss):
    """weight * fsp, mean over consecutive pairs of layers, at least two, shallow ones first.

    Other than in the paper, a learned linear map brings the student to the teacher's channels where they differ.
    Positions of student and teacher need nothing in common.

    Source: Yim et al. 2017, "A Gift from Knowledge Distillation", CVPR, section 3; the weight is that of the comparison
    in Tian et al. 2020, arXiv:1910.10699.
    """

    weight: float = 50.0

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """The linear maps."""
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
    """weight * variational_information: how unlikely the teacher's feature is, given the student's.

    The mean is learned by three linear maps of the channels at each position, ReLU between them; the variance of each
    channel is softplus(alpha) + 1e-5, learned too. The loss may go below 0.

    Args:
        weight: that of the comparison in Tian et al. 2020, arXiv:1910.10699.
        variance: that training begins with; 5 in the released code.

    Source: Ahn et al. 2019, arXiv:1904.05835, section 2, eq. 4-6; the regressor is that of their released code.
    """

    weight: float = 1.0
    variance: Divisor = 5.0

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)
        check_positive("variance", self.variance)

    def build(self, pairs: Sequence[tuple[Shape, Shape]]) -> nn.Module:
        """The means and variances."""
        pairs = check_pairs(pairs)
        return _Apart(self.weight, pairs, [_Variational(left[0], right[0], self.variance) for left, right in pairs])
