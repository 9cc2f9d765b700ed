"""Relation losses, which compare distances and angles between samples, as frozen dataclasses and plain functions.

They take features of a batch, (batch, ...) of the student and of the teacher, whose sizes may differ. They compare all
pairs of samples of the batch, in O(batch^2) memory. Where several processes train, every process compares its own
batch; with `gather=True`, `Distill` passes the joined batch of all, with its gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchslim.core.checks import check_fields
from torchslim.distill.given import check_tensors
from torchslim.distill.losses.response import check_positive, check_weights
from torchslim.distill.ruled_out import comparable
from torchslim.errors import DistillError

TINY = 1e-12
CHUNK = 2**16  # cosines computed at a time, which a core's cache holds; more where one corner alone has more


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the distances of all pairs, which are divided by the mean distance of their side.

    Shapes: (batch, ...), (batch, ...) -> (). Source: Park et al. 2019, arXiv:1904.05068, section 3.2.1.
    """
    left, right = (_unit_distances(rows) for rows in _rows(student, teacher))
    return functional.smooth_l1_loss(left, right)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles that all triples of samples form.

    Triples are processed in chunks, and the gradient is computed with the value, so memory grows with batch^2, not
    batch^3, and the cost of the triples does not depend on the size of the features.

    Shapes: (batch, ...), (batch, ...) -> (). Source: Park et al. 2019, arXiv:1904.05068, section 3.2.2.
    """
    ours, theirs = _rows(student, teacher, least=3)
    loss: Tensor = _Angles.apply(_gram(ours), _gram(theirs), ours.dtype)
    return loss


class _Angles(torch.autograd.Function):
    """Mean Huber loss of all cosines from both Gram matrices; its gradient goes to the first matrix only."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, dtype: torch.dtype) -> Tensor:
        size = len(student)
        gradient, lengths = torch.zeros_like(student), torch.zeros_like(student)
        total = student.new_zeros(())
        sides = [(gram, _inverse_distances(gram)) for gram in (student, teacher)]
        for corners in torch.arange(size, device=student.device).split(max(1, CHUNK // size**2)):
            cosines, scales = [], []
            for gram, inverse in sides:
                at, scale = gram[corners], inverse[corners].to(dtype)
                # (x_j - x_i) . (x_k - x_i), in units of both lengths
                products = gram - at[:, :, None]
                products.sub_(at[:, None, :]).add_(gram.diagonal()[corners][:, None, None])
                cosines.append(products.to(dtype).mul_(scale[:, :, None]).mul_(scale[:, None, :]))
                scales.append(scale)
            error = cosines[0] - cosines[1]
            slope = error.clamp(-1, 1)
            total += torch.linalg.vecdot(slope.flatten(), (error - slope / 2).flatten())  # Huber's loss
            lengths[corners] = -torch.linalg.vecdot(slope, cosines[0]).double() * sides[0][1][corners] ** 2
            direct = slope.mul_(scales[0][:, :, None]).mul_(scales[0][:, None, :])
            gradient += direct.sum(0)
            rows = direct.sum(2).double()
            gradient[corners] -= 2 * rows
            gradient.diagonal()[corners] += rows.sum(1)
        gradient -= 2 * lengths
        gradient.diagonal().add_(lengths.sum(0) + lengths.sum(1))
        ctx.save_for_backward(gradient / size**3)
        return (total / size**3).to(dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].double(), None, None


def _inverse_distances(gram: Tensor) -> Tensor:
    """Inverse distances of all pairs; 0 for equal samples."""
    squares, equal = _squares(gram)
    return squares.masked_fill(equal, 1).rsqrt().masked_fill(equal, 0)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of both batches' row-normalized Gram matrices.

    Shapes: (batch, ...), (batch, ...) -> (). Source: Tung & Mori 2019, arXiv:1907.09682, section 3.
    """
    left, right = (functional.normalize(rows @ rows.T, dim=1, eps=TINY) for rows in _rows(student, teacher))
    return functional.mse_loss(left, right)


def probabilistic_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the probabilities that a sample picks another as its neighbor, mean over samples.

    The probability is proportional to (1 + cosine) / 2; a sample does not pick itself.

    Shapes: (batch, ...), (batch, ...) -> (). Source: Passalis & Tefas 2018, arXiv:1803.10837, section 3.
    """
    probabilities = []
    for rows in _rows(student, teacher, least=3):
        unit = functional.normalize(rows, dim=1, eps=TINY)
        near = _off_diagonal((unit @ unit.T + 1) / 2).clamp_min(1e-7)
        probabilities.append(near / near.sum(1, keepdim=True))
    return (probabilities[1] * (probabilities[1].log() - probabilities[0].log())).sum(1).mean()


def correlation_congruence(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Mean squared difference of the correlations of all pairs, by the Taylor series of a Gaussian kernel.

    The series is exp(-2 gamma) * sum over p <= order of (2 gamma)^p / p! * cosine^p, of normalized features.

    Shapes: (batch, ...), (batch, ...) -> (). Source: Peng et al. 2019, arXiv:1904.01802, section 3.
    """
    kernels = []
    for rows in _rows(student, teacher):
        unit = functional.normalize(rows, dim=1, eps=TINY)
        cosine = unit @ unit.T
        series = [(2 * gamma) ** power / math.factorial(power) * cosine**power for power in range(order + 1)]
        kernels.append(math.exp(-2 * gamma) * torch.stack(series).sum(0))
    return functional.mse_loss(kernels[0], kernels[1])


def listwise_ranking(student: Tensor, teacher: Tensor, *, alpha: float = 3.0, beta: float = 3.0) -> Tensor:
    """Negative log-likelihood of the teacher's neighbor order under the student's scores, mean over samples and places.

    Scores are -alpha * distance^beta of normalized features; the likelihood of an order is that of Plackett and Luce.

    Shapes: (batch, ...), (batch, ...) -> (). Source: Chen et al. 2018 (DarkRank), arXiv:1707.01220, section 4, the
    hard form.
    """
    left, right = (functional.normalize(rows, dim=1, eps=TINY) for rows in _rows(student, teacher, least=3))
    scores, order = _off_diagonal(-alpha * _distances(left) ** beta), _off_diagonal(_distances(right)).argsort(1)
    ranked = scores.gather(1, order)
    remaining = ranked.flip(1).logcumsumexp(1).flip(1)  # log-sum over a neighbor and all later ones
    return (remaining - ranked).mean()


def _rows(student: Tensor, teacher: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both features as matrices (batch, n) in at least float32, the teacher's without gradient."""
    check_tensors(student=student, teacher=teacher)
    if not student.dim() or not teacher.dim():
        raise DistillError("features of a relation must be of the shape (batch, ...), got a single number")
    if len(student) != len(teacher):
        raise DistillError(
            f"student and teacher features are of {len(student)} and {len(teacher)} samples; relations need the same"
        )
    if len(student) < least:
        raise DistillError(
            f"a relation needs at least {least} samples in a batch, got {len(student)}; raise the batch size, or drop "
            "the last, smaller batch of the loader"
        )
    wide = [rows.to(torch.promote_types(rows.dtype, torch.float32)).flatten(1) for rows in (student, teacher.detach())]
    return comparable(*wide)


def _distances(rows: Tensor) -> Tensor:
    """Euclidean distances of all pairs; the gradient at distance 0 is 0, not undefined."""
    squares, equal = _squares(_gram(rows))
    return squares.masked_fill(equal, 1).sqrt().masked_fill(equal, 0).to(rows.dtype)


def _gram(rows: Tensor) -> Tensor:
    """Inner products of all pairs of centered rows, in float64: float32 loses the differences of near samples."""
    centered = (rows - rows.mean(0)).double()
    return centered @ centered.T


def _squares(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of all pairs, and a mask that is True for equal samples."""
    squared_norms = gram.diagonal()
    squares = squared_norms[:, None] + squared_norms[None, :] - 2 * gram
    return squares, squares <= 1e-12 * (squared_norms[:, None] + squared_norms[None, :]) + TINY**2


def _unit_distances(rows: Tensor) -> Tensor:
    distances = _distances(rows)
    positive = distances > 0
    return distances / distances.sum().div(positive.sum().clamp_min(1)).clamp_min(TINY)


def _off_diagonal(square: Tensor) -> Tensor:
    """A square matrix without its diagonal: (n, n) -> (n, n - 1)."""
    size = len(square)
    others = ~torch.eye(size, dtype=torch.bool, device=square.device)
    return square[others].view(size, size - 1)


# ----------------------------------------------------------------------------------------------------------------------


class RelationLoss:
    """Base of the relation losses, which are called with features of a batch and return a weighted loss."""

    written = "RKD(...)"  # how messages name it

    @property
    def least(self) -> int:
        """Smallest number of samples that the loss needs."""
        return 2

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class RKD(RelationLoss):
    """Relational distillation: distance * rkd_distance + angle * rkd_angle.

    Source: Park et al. 2019, arXiv:1904.05068; the weights are those of its classification experiments.
    """

    distance: float = 25.0
    angle: float = 50.0
    gather: bool = False

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_weights(distance=self.distance, angle=self.angle)

    @property
    def least(self) -> int:
        """Smallest number of samples: three for angles."""
        return 3 if self.angle else 2

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        parts = [
            weight * part(student, teacher)
            for weight, part in ((self.distance, rkd_distance), (self.angle, rkd_angle))
            if weight
        ]
        return torch.stack(parts).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityPreserving(RelationLoss):
    """weight * similarity_preserving. Source: Tung & Mori 2019, arXiv:1907.09682, whose weight is 3000."""

    weight: float = 3000.0
    gather: bool = False

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.weight * similarity_preserving(student, teacher)


@dataclass(frozen=True, slots=True, kw_only=True)
class PKT(RelationLoss):
    """weight * probabilistic_transfer. Source: Passalis & Tefas 2018, arXiv:1803.10837."""

    weight: float = 100.0
    gather: bool = False

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)

    @property
    def least(self) -> int:
        """Smallest number of samples: one and two others."""
        return 3

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.weight * probabilistic_transfer(student, teacher)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrelationCongruence(RelationLoss):
    """weight * correlation_congruence. Source: Peng et al. 2019, arXiv:1904.01802."""

    weight: float = 100.0
    gamma: float = 0.4
    order: int = 2
    gather: bool = False

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)
        check_positive("gamma", self.gamma)
        if not isinstance(self.order, int) or self.order < 1:
            raise DistillError(f"order must be a whole number of at least 1, got {self.order!r}")

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.weight * correlation_congruence(student, teacher, gamma=self.gamma, order=self.order)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListwiseRanking(RelationLoss):
    """weight * listwise_ranking. Source: Chen et al. 2018 (DarkRank), arXiv:1707.01220."""

    weight: float = 1.0
    alpha: float = 3.0
    beta: float = 3.0
    gather: bool = False

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        for name in ("weight", "alpha", "beta"):
            check_positive(name, getattr(self, name))

    @property
    def least(self) -> int:
        """Smallest number of samples: one and two others."""
        return 3

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.weight * listwise_ranking(student, teacher, alpha=self.alpha, beta=self.beta)
