"""Contrastive distillation: pulls a student's embedding of a sample to the teacher's of that sample, not of others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchslim.core.checks import Divisor, check_fields
from torchslim.core.distributed import gathered
from torchslim.distill.features.align import Shape, wide
from torchslim.distill.losses.response import check_positive
from torchslim.errors import DistillError


def contrast(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    samples: int,
    counts: Tensor | None = None,
    *,
    partition: float | Tensor = 1.0,
) -> Tensor:
    """Mean over the batch of -log h(positive) - the sum over negatives of log(1 - h(negative)).

    h = e^(anchor . other / temperature) / (e^(anchor . other / temperature) + partition * N / M): the probability that
    `other` is the anchor's positive and not one of N negatives drawn from M samples.

    Args:
        anchor: unit vectors (batch, size).
        positive: unit vectors of the other network on the same samples, (batch, size).
        negatives: unit vectors of the other network on other samples, (batch, n, size).
        temperature: of the scores.
        samples: M, the number of samples in the data set.
        counts: True where a negative counts, (batch, n); N is the number that count. None: all count.
        partition: the constant that the scores are divided by; 1 in the paper.

    Returns: ().
    Source: Tian, Krishnan & Isola 2020, arXiv:1910.10699, section 3.1.
    """
    if anchor.shape != positive.shape or negatives.dim() != 3 or negatives.shape[::2] != anchor.shape:
        raise DistillError(
            "contrast takes an anchor and a positive of (batch, size) and negatives of (batch, n, size), got "
            f"{tuple(anchor.shape)}, {tuple(positive.shape)} and {tuple(negatives.shape)}"
        )
    check_positive("temperature", temperature)
    anchor, positive, negatives = wide(anchor), wide(positive), wide(negatives)
    near = (anchor * positive).sum(1) / temperature
    far = (negatives @ anchor[:, :, None])[:, :, 0] / temperature
    level = torch.as_tensor(partition, dtype=near.dtype, device=near.device).log() - math.log(samples)
    return _estimation(near, far, level, counts)


def _estimation(near: Tensor, far: Tensor, level: Tensor, counts: Tensor | None) -> Tensor:
    """Noise-contrastive loss of scores (batch,), (batch, n) and log(partition / M); in logs, e^score may be huge."""
    drawn = torch.full_like(near, far.shape[1]) if counts is None else counts.sum(1).to(near.dtype)
    level = level + drawn.clamp_min(1).log()
    losses = functional.softplus(far - level[:, None])
    if counts is not None:
        losses = losses.masked_fill(~counts.bool(), 0)
    return (functional.softplus(level - near) + losses.sum(1)).mean()


class Contrast(nn.Module):
    """Two trained embeddings, and for each a bank that holds the embedding of every sample of the data set."""

    bank_student: Tensor
    bank_teacher: Tensor
    labels: Tensor
    level: Tensor

    def __init__(self, config: CRD, student: Shape, teacher: Shape, samples: int) -> None:
        super().__init__()
        self.config, self.samples = config, samples
        self.embed_student = nn.Linear(student[0], config.size)
        self.embed_teacher = nn.Linear(teacher[0], config.size)
        generator = torch.Generator().manual_seed(0)
        for name in ("bank_student", "bank_teacher"):
            rows = torch.randn(samples, config.size, generator=generator)
            self.register_buffer(name, functional.normalize(rows, dim=1))
        self.register_buffer("labels", torch.full((samples,), -1))
        # log(partition / samples) for the student's and the teacher's anchors, nan until the first batch in training
        self.register_buffer("level", torch.full((2,), torch.nan))

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, target: Tensor | None = None) -> Tensor:
        """Weighted loss of a batch; in training mode the banks are then updated with the batch.

        Negatives are drawn with torch's default generator of the device. Several processes need batches of equal size.

        Shapes: (batch, channels, *positions), (batch, others, *positions), (batch,), (batch,) or None -> ().

        Args:
            student: features, averaged over positions.
            teacher: features of the same samples.
            index: places of the samples in the data set.
            target: classes of the samples; samples of one class are no negatives of each other, -1 is unknown.

        Raises:
            DistillError: an index is out of range, or sizes do not match.
        """
        index, target = self._checked(student, teacher, index, target)
        with torch.autocast(student.device.type, enabled=False):
            students = self._embedded(self.embed_student, student)
            teachers = self._embedded(self.embed_teacher, teacher.detach())
            others = self.draw_others(index.device)
            classes = self.labels[index] if target is None else target
            own = index[:, None] == others
            counts = ~own & ((classes[:, None] < 0) | (classes[:, None] != self.labels[others]))
            near, levels, losses = (students * teachers).sum(1) / self.config.temperature, [], []
            for place, (anchor, bank) in enumerate(((students, self.bank_teacher), (teachers, self.bank_student))):
                far = anchor @ bank[others].T / self.config.temperature
                first = far.detach()[~own].logsumexp(0) - (~own).sum().clamp_min(1).to(far.dtype).log()
                levels.append(torch.where(self.level[place].isnan(), first, self.level[place]))
                losses.append(_estimation(near, far, levels[place], counts))
            if self.training:
                self._remember(students.detach(), teachers.detach(), index, target, torch.stack(levels))
            return self.config.weight * (losses[0] + losses[1])

    def _embedded(self, embed: nn.Linear, feature: Tensor) -> Tensor:
        feature = feature.to(embed.weight.dtype)
        return functional.normalize(embed(feature.flatten(2).mean(2) if feature.dim() > 2 else feature), dim=1)

    def draw_others(self, device: torch.device) -> Tensor:
        """Places of the samples that the batch is contrasted with: `negatives` random ones, or all where fewer."""
        if self.config.negatives >= self.samples - 1:
            return torch.arange(self.samples, device=device)
        return torch.randint(self.samples, (self.config.negatives,), device=device)

    @torch.no_grad()
    def _remember(self, student: Tensor, teacher: Tensor, index: Tensor, target: Tensor | None, levels: Tensor) -> None:
        """Update the banks by momentum with all processes' batches; a sample that occurs twice counts by its mean."""
        target = self.labels[index] if target is None else target
        student, teacher, index, target, levels = map(gathered, (student, teacher, index, target, levels[None]))
        self.level.copy_(levels.mean(0))
        rows, inverse = index.unique(return_inverse=True)
        for bank, batch in ((self.bank_student, student), (self.bank_teacher, teacher)):
            new = batch.new_zeros(len(rows), batch.shape[1]).index_add_(0, inverse, batch)
            new = functional.normalize(new, dim=1)
            moved = self.config.momentum * bank[rows] + (1 - self.config.momentum) * new
            bank[rows] = functional.normalize(moved, dim=1)
        self.labels[index] = target

    def _checked(
        self, student: Tensor, teacher: Tensor, index: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch = len(student)
        sizes = (batch, self.embed_student.in_features), (batch, self.embed_teacher.in_features)
        got = tuple(student.shape[:2]), tuple(teacher.shape[:2])
        if got != sizes:
            raise DistillError(
                f"built for features (batch, channels, ...) of {sizes[0]} and {sizes[1]}, got {got[0]} and {got[1]}; "
                "build a new one for other channels"
            )
        for name, ids in (("index", index), ("target", target)):
            if ids is not None and (ids.shape != (batch,) or ids.is_floating_point() or ids.dtype == torch.bool):
                raise DistillError(
                    f"{name} must hold a whole number for each of {batch} samples, got {ids.dtype} of shape "
                    f"{tuple(ids.shape)}"
                )
        if batch and not 0 <= int(index.min()) <= int(index.max()) < self.samples:
            raise DistillError(
                f"index must be in [0, {self.samples}), the samples' places in the data set, got {int(index.min())} to "
                f"{int(index.max())}; build it with the data set's size"
            )
        return index.long(), None if target is None else target.long()


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CRD:
    """Contrastive distillation: weight * (contrast of the student's anchors + that of the teacher's), against banks.

    The scores' constant is estimated from the first batch, as in the released code: without it, thousands of negatives
    outweigh everything else.

    Args:
        weight: 0.8 in the paper.
        temperature: 0.07 in the released code.
        size: of the embeddings.
        negatives: shared by all samples of a batch, which makes one matrix product; the paper draws 16384 for each
            sample. All samples, where there are fewer. A sample is no negative of itself.
        momentum: the share of a bank's row that stays.

    Source: Tian, Krishnan & Isola 2020, arXiv:1910.10699, section 3.1.

    >>> import torch
    >>> module = CRD(size=16).build((8, 4, 4), (32,), samples=100)
    >>> module(torch.randn(2, 8, 4, 4), torch.randn(2, 32), torch.tensor([3, 70])).shape
    torch.Size([])
    """

    weight: float = 0.8
    temperature: Divisor = 0.07
    size: int = 128
    negatives: int = 4096
    momentum: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)
        check_positive("temperature", self.temperature)
        for name in ("size", "negatives"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise DistillError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.momentum < 1:
            raise DistillError(f"momentum must be in [0, 1), the share of a bank's row that stays, got {self.momentum}")

    def build(self, student: Shape, teacher: Shape, samples: int) -> nn.Module:
        """Module with embeddings and banks for features (channels, *positions) of a data set of `samples` samples.

        Raises:
            DistillError: fewer than two samples, or a feature without channels.
        """
        if samples < 2:
            raise DistillError(f"CRD contrasts a sample with others, so it needs at least two samples, got {samples}")
        if min(len(student), len(teacher)) < 1 or min(*student, *teacher) < 1:
            raise DistillError(
                f"features are (channels, *positions), none of size 0, got {tuple(student)} of the student and "
                f"{tuple(teacher)} of the teacher"
            )
        return Contrast(self, student, teacher, samples)
