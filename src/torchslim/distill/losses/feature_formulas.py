"""Formulas of the feature losses, as functions of tensors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from torchslim.distill.features.align import (
    Masks,
    align,
    check_positions,
    masked,
    mean_over,
    pooled,
    wide,
)
from torchslim.distill.ruled_out import comparable
from torchslim.errors import DistillError


def hint(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over the batch, channels and the positions that count.

    Shapes: (batch, channels, *positions), the same, (batch, *positions) or None -> ().
    Source: Romero et al. 2015 (FitNets), arXiv:1412.6550, section 2.2, eq. 3, which is half of the sum; Jiao et al.
    2020 (TinyBERT), arXiv:1909.10351, eq. 8.
    """
    student, teacher = _alike(student, teacher, mask)
    return mean_over((student - teacher).square().mean(1), mask)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of 1 - cosine of the channels, over the batch and the positions that count.

    Shapes: (batch, channels, *positions), the same, (batch, *positions) or None -> ().
    Source: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 2.
    """
    student, teacher = _alike(student, teacher, mask)
    return mean_over(1 - functional.cosine_similarity(student, teacher, dim=1), mask)


def attention(feature: Tensor, power: float = 2) -> Tensor:
    """Attention map, the sum over channels of |A|^power: (batch, channels, *positions) -> (batch, *positions).

    Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928, section 3.1, F_sum^p.
    """
    return wide(feature).abs().pow(power).sum(1)


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2, masks: Masks = (None, None)) -> Tensor:
    """Mean squared difference of the attention maps, each sample's flattened and divided by its l2 norm.

    The mean is over the batch and the positions that count, as in the released code; eq. 2 of the paper is the norm of
    the difference. Channels may differ. Where the positions differ, the student's attention map is resized.

    Shapes: (batch, channels, *positions), (batch, others, *elsewhere), their masks -> ().
    Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928, section 3.1.
    """
    check_positions("attention transfer", tuple(student.shape[1:]), tuple(teacher.shape[1:]))
    left, right = (
        attention(masked(*pair), power)[:, None] for pair in zip((student, teacher.detach()), masks, strict=True)
    )
    left, right, mask = align(left, right, masks)
    left, right = (functional.normalize(maps.flatten(1), dim=1) for maps in (left, right))
    return mean_over((left - right).square(), None if mask is None else mask.flatten(1))


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Mean over positions of the product of every channel of one layer with every channel of a later one.

    The larger feature is max-pooled to the size of the smaller.

    Shapes: (batch, channels, *positions), (batch, others, *elsewhere) -> (batch, channels, others).
    Source: Yim et al. 2017, "A Gift from Knowledge Distillation", CVPR, section 3.2, eq. 1.
    """
    left, right = (feature.reshape(*feature.shape[:2], -1) for feature in pooled([wide(first), wide(second)]))
    return left @ right.mT / left.shape[2]


def fsp(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared difference of the flows between two layers of the student and two of the teacher.

    The mean is over the batch and all pairs of channels; the paper sums over the pairs.

    Shapes: two of (batch, channels, *positions), two with the same channels and any positions -> ().
    Source: Yim et al. 2017, "A Gift from Knowledge Distillation", CVPR, section 3.3, eq. 2.
    """
    left, right = flow(*student), flow(*(feature.detach() for feature in teacher))
    if left.shape != right.shape:
        raise DistillError(
            f"flows (batch, channels, channels) of the student {tuple(left.shape)} and of the teacher "
            f"{tuple(right.shape)} differ; FSP().build(...) learns a projection"
        )
    return functional.mse_loss(left, right)


def variational_information(mean: Tensor, variance: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch, channels and positions of -log q(teacher | student) of a Gaussian, without the constant.

    The term is log(sigma) + (teacher - mean)^2 / (2 sigma^2), with a variance for each channel.

    Shapes: (batch, channels, *positions), (channels,), the same as the mean, (batch, *positions) or None -> ().
    Source: Ahn et al. 2019, arXiv:1904.05835, section 2, eq. 4-6.
    """
    mean, teacher = _alike(mean, teacher, mask)
    variance = variance.view(-1, *[1] * (mean.dim() - 2))
    return mean_over((variance.log() + (teacher - mean).square() / variance).mean(1) / 2, mask)


def _alike(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both features in at least float32, 0 where masked, the teacher's without gradient."""
    if student.shape != teacher.shape or student.dim() < 2:
        raise DistillError(
            f"features (batch, channels, *positions) of the student {tuple(student.shape)} and of the teacher "
            f"{tuple(teacher.shape)} differ; build(...) of a feature loss brings them together"
        )
    return comparable(masked(wide(student), mask), masked(wide(teacher.detach()), mask))
