"""Response losses, which compare outputs: frozen dataclasses that are config, recipe schema and function in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from torchslim.core.arguments import checks_arguments
from torchslim.core.checks import Divisor, check_fields
from torchslim.core.metrics import default_loss
from torchslim.distill.given import check_labels, check_tensors
from torchslim.distill.ruled_out import comparable, divergence_terms, log_probabilities, log_sum
from torchslim.errors import DistillError

Kind = Literal["classes", "labels"]
"""Meaning of logits: one of several classes (softmax), or several labels that are each on or off (sigmoid)."""


@checks_arguments(DistillError)
def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, kind: Kind = "classes") -> Tensor:
    """Mean over the batch of KL(teacher || student) of the softened outputs, times temperature squared.

    The square keeps the gradient's size independent of the temperature. No gradient reaches the teacher. Dense
    outputs count each position as a sample; half precision is computed in float32. With kind "labels" each label is a
    distribution over yes and no, and the divergence is their sum. A class that the teacher rules out with -inf counts
    0; one that only the student rules out makes the divergence infinite, which raises a DistillError.

    Shapes: (batch, classes, ...), (batch, classes, ...) -> ().
    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2.
    """
    student, teacher = _pair(student, teacher, 1 if kind == "labels" else 2)
    if kind == "labels":
        yes, no = (
            divergence_terms(*(functional.logsigmoid(sign * logits / temperature) for logits in (student, teacher)))
            for sign in (1, -1)
        )
        divergence = yes + no
    else:
        divergence = divergence_terms(*(log_probabilities(logits / temperature) for logits in (student, teacher)))
    return divergence.sum(1).mean() * temperature**2


def decoupled(student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two parts of the divergence: target against the rest, and among the classes that are not the target.

    Each is the mean over the batch, times temperature squared. Per sample, KL(teacher || student) is the first plus
    the second times the teacher's probability of not being the target.

    Shapes: (batch, classes), (batch, classes), (batch,) -> (), ().
    Source: Zhao et al. 2022, arXiv:2203.08679, section 3.
    """
    student, teacher = _pair(student, teacher, 2)
    log_student, log_teacher = (log_probabilities(logits / temperature) for logits in (student, teacher))
    if target.min() < 0 or target.max() >= student.shape[1]:
        raise DistillError(
            f"labels must be in [0, {student.shape[1]}) for {student.shape[1]} outputs, got {int(target.min())} to "
            f"{int(target.max())}"
        )
    is_target = functional.one_hot(target, student.shape[1]).bool()

    def binary(logs: Tensor) -> Tensor:
        rest = log_sum(logs.masked_fill(is_target, -torch.inf))
        return torch.stack([logs[is_target], rest], 1)

    def others(logits: Tensor) -> Tensor:
        rest = logits[~is_target].reshape(len(logits), -1)
        return log_probabilities(rest / temperature)

    first = divergence_terms(binary(log_student), binary(log_teacher))
    second = divergence_terms(others(student), others(teacher))
    scale = temperature**2
    return first.sum(1).mean() * scale, second.sum(1).mean() * scale


def pearson_distance(left: Tensor, right: Tensor) -> Tensor:
    """One minus the correlation of matching rows of two matrices: (rows, n), (rows, n) -> (rows,).

    A row without variance has no correlation; its distance is 1.
    """
    left, right = (rows - rows.mean(1, keepdim=True) for rows in (left, right))
    return 1 - functional.cosine_similarity(left, right, dim=1)


def standardized(logits: Tensor) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the classes (dimension 1) that are not -inf.

    Source: Sun et al. 2024, arXiv:2403.01427, section 4.
    """
    ruled_out = torch.isneginf(logits)
    count = (~ruled_out).sum(1, keepdim=True).clamp(min=1)
    finite = logits.masked_fill(ruled_out, 0.0)
    centered = (finite - finite.sum(1, keepdim=True) / count).masked_fill(ruled_out, 0.0)
    variance = centered.square().sum(1, keepdim=True) / count
    constant = variance == 0  # at 0 the square root has no gradient
    deviation = variance.masked_fill(constant, 1.0).sqrt().masked_fill(constant, 0.0)
    return (centered / (deviation + 1e-7)).masked_fill(ruled_out, -torch.inf)


def _pair(student: Tensor, teacher: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both logits in at least float32, the teacher's without gradient; DistillError where they cannot be compared."""
    check_tensors(student=student, teacher=teacher)
    if student.shape != teacher.shape:
        raise DistillError(
            f"student and teacher logits differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}; response "
            "distillation needs the same classes"
        )
    if student.dim() < 2 or student.shape[1] < least:
        raise DistillError(
            f"a response loss compares at least two classes, got logits of shape {tuple(student.shape)}; for other "
            "outputs give MSE(), or a function of your own, such as response=lambda s, t, y: mse_loss(s, t)"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


# ----------------------------------------------------------------------------------------------------------------------


class ResponseLoss:
    """Base of the response losses. `soft` is the weighted teacher's term alone, of (n, classes) logits."""

    written = "KD(...), DKD(...), DIST(...) or MSE(...)"  # how messages name it

    needs_labels = False

    @property
    def label_weight(self) -> float:
        """Weight of the labels' term beside the teacher's."""
        return 1.0

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Weighted teacher's term: (n, classes), (n, classes), (n,) or None -> ()."""
        raise NotImplementedError

    def blend(self, teachers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Logits whose softened outputs are the weighted mean of the teachers': several (n, classes) -> (n, classes).

        Losses without a temperature, or on standardized logits, get the mean of the (standardized) logits.
        """
        temperature, standardize = getattr(self, "temperature", None), getattr(self, "standardize", False)
        weighted = [(weight, logits) for weight, logits in zip(weights, teachers, strict=True) if weight > 0]
        weights = [weight for weight, _ in weighted]
        rows = [logits.to(torch.promote_types(logits.dtype, torch.float32)) for _, logits in weighted]
        if any(row.shape != rows[0].shape for row in rows):
            raise DistillError(f"the teachers' logits differ in shape: {', '.join(str(tuple(t.shape)) for t in rows)}")
        if temperature is None or standardize:
            rows = [standardized(row) if standardize else row for row in rows]
            return torch.stack([weight * row for weight, row in zip(weights, rows, strict=True)]).sum(0)
        logs = torch.tensor(weights, dtype=rows[0].dtype, device=rows[0].device).log().view(-1, 1, 1)
        scaled = torch.stack(rows) / temperature
        if getattr(self, "kind", "classes") == "labels":
            yes, no = (functional.logsigmoid(sign * scaled).add(logs).logsumexp(0) for sign in (1, -1))
            return torch.mul(yes - no, temperature)
        shares = torch.stack([log_probabilities(logits) for logits in scaled]).add(logs)
        return torch.mul(shares.logsumexp(0), temperature)

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Loss, with the labels' term if there are labels: (batch, classes, ...) or tokens (batch, time, classes)."""
        check_tensors(student=student, teacher=teacher)
        check_labels(target, len(student) if student.dim() else 1)
        if self.label_weight > 0 and target is None:
            raise DistillError(
                f"{type(self).__name__} gives the labels the weight {self.label_weight:g}, but there are none; "
                "inside Distill set label_weight=0; for KD set alpha=1"
            )
        soft = self.soft(*positions(student, teacher, target))
        if self.label_weight == 0 or target is None:
            return soft
        return self.label_weight * default_loss(student, target) + soft


@dataclass(frozen=True, slots=True, kw_only=True)
class KD(ResponseLoss):
    """Soft-target distillation: (1 - alpha) * cross entropy + alpha * T^2 * KL(teacher || student).

    With labels None, alpha must be 1. Inside `Distill` the label term is the task's own loss.

    Args:
        temperature: values above 1 give the classes that the teacher rates as unlikely more weight.
        alpha: the weight of the teacher; the labels get the rest.
        standardize: compare logits as multiples of their deviation, whatever their size (Sun 2024).
        kind: "labels" for sigmoid outputs.

    Shapes: (batch, classes), (batch, classes), (batch,) or None -> (). Dense: (batch, classes, ...) with labels
    (batch, ...), or tokens (batch, time, classes) with labels (batch, time).
    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2.

    >>> import torch
    >>> logits = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    >>> KD(alpha=1.0)(logits, logits, None).item()
    0.0
    """

    temperature: Divisor = 4.0
    alpha: float = 0.9
    standardize: bool = False
    kind: Kind = "classes"

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("temperature", self.temperature)
        if not 0 <= self.alpha <= 1:
            raise DistillError(f"alpha must be in [0, 1], the weight of the teacher, got {self.alpha}")
        if self.kind not in ("classes", "labels"):
            raise DistillError(f"kind must be 'classes' or 'labels', got {self.kind!r}")

    @property
    def label_weight(self) -> float:
        """Weight of the labels: 1 - alpha."""
        return 1 - self.alpha

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Weighted teacher's term; classes in dimension 1."""
        student, teacher = _scaled(student, teacher, self.standardize)
        return self.alpha * kl_divergence(student, teacher, temperature=self.temperature, kind=self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class DKD(ResponseLoss):
    """Decoupled distillation: alpha * (target against the rest) + beta * (among the rest), which KD couples.

    Needs labels, one class for each sample.

    Source: Zhao et al. 2022, arXiv:2203.08679, section 3; their ImageNet weights are 1 and 0.5, CIFAR-100's 1 and 8.
    """

    needs_labels = True

    temperature: Divisor = 4.0
    alpha: float = 1.0
    beta: float = 2.0
    standardize: bool = False

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("temperature", self.temperature)
        check_weights(alpha=self.alpha, beta=self.beta)

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Weighted sum of both parts."""
        if target is None or target.is_floating_point() or target.dim() != 1:
            got = "none" if target is None else f"{target.dtype} of shape {tuple(target.shape)}"
            raise DistillError(f"DKD needs one class index for each sample, got {got}; KD needs no labels")
        student, teacher = _scaled(student, teacher, self.standardize)
        first, second = decoupled(student, teacher, target, temperature=self.temperature)
        return self.alpha * first + self.beta * second


@dataclass(frozen=True, slots=True, kw_only=True)
class DIST(ResponseLoss):
    """Distillation from a stronger teacher: the order of classes for each sample, and of samples for each class.

    Classes that student and teacher both rule out with -inf for the whole batch are left out.

    The loss is beta * (1 - correlation over classes) + gamma * (1 - correlation over the batch), of softened
    probabilities, times temperature squared. Where several processes train, every process compares its own batch; with
    `gather=True`, inside `Distill`, it compares the joined batch of all.

    Source: Huang et al. 2022, arXiv:2205.10536, section 4.
    """

    temperature: Divisor = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    standardize: bool = False
    gather: bool = False

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("temperature", self.temperature)
        check_weights(beta=self.beta, gamma=self.gamma)

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Weighted sum of both distances; a batch of one sample has only the first."""
        student, teacher = _pair(*_scaled(student, teacher, self.standardize), 2)
        present = ~(torch.isneginf(student) & torch.isneginf(teacher)).all(0)
        student, teacher = (log_probabilities(logits / self.temperature).exp() for logits in (student, teacher))
        loss = self.beta * pearson_distance(student, teacher).mean()
        if len(student) > 1:
            columns = pearson_distance(student.T[present], teacher.T[present])
            loss = loss + self.gamma * columns.sum() / max(len(columns), 1)
        return loss * self.temperature**2


@dataclass(frozen=True, slots=True, kw_only=True)
class MSE(ResponseLoss):
    """Mean squared difference of the outputs: logits, or the values of a regression, (batch,) or (batch, ...).

    Source: Kim et al. 2021, arXiv:2105.08919, section 3, where it is summed over the classes.
    """

    weight: float = 1.0
    standardize: bool = False

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        check_positive("weight", self.weight)

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Weighted mean squared difference."""
        if student.dim() == teacher.dim() == 1:
            student, teacher = student[:, None], teacher[:, None]
        student, teacher = comparable(*_pair(*_scaled(student, teacher, self.standardize), 1))
        return self.weight * functional.mse_loss(student, teacher)


def _scaled(student: Tensor, teacher: Tensor, standardize: bool) -> tuple[Tensor, Tensor]:
    if not standardize:
        return student, teacher
    student, teacher = _pair(student, teacher, 2)
    return standardized(student), standardized(teacher)


def check_positive(name: str, value: float) -> None:
    """Raise DistillError unless `value` is finite and above 0."""
    if not 0 < value < float("inf"):
        raise DistillError(f"{name} must be a finite number above 0, got {value}")


def check_weights(**values: float) -> None:
    """Raise DistillError unless all values are finite, none is negative and at least one is above 0."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise DistillError(f"{name} must be a finite number of at least 0, got {value}")
    if not any(values.values()):
        raise DistillError(f"{' and '.join(values)} are 0: nothing to learn from; raise one of them")


# ----------------------------------------------------------------------------------------------------------------------


def positions(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and labels with each position of dense outputs as a sample: (n, classes), (n, classes), (n,) or None.

    Dense outputs are (batch, classes, ...) for images and (batch, time, classes) for tokens; the shape of the mask or
    of the labels decides which.

    Args:
        student: logits.
        teacher: logits of the same shape.
        target: labels; class indices of positions lose the positions that are left out, other labels are unchanged.
        mask: True where a position counts.
        ignore_index: label of positions that do not count.

    Raises:
        DistillError: logits have three dimensions and neither mask nor labels decide, or no position counts.
    """
    shape, rows = student.shape, None
    if len(shape) > 2 and shape == teacher.shape:
        tokens, pixels = shape[:-1], shape[:1] + shape[2:]
        layouts = [marks.shape for marks in (mask, target) if marks is not None and marks.shape in (tokens, pixels)]
        if layouts[:1] == [pixels] or (not layouts and len(shape) > 3):
            rows, student, teacher = pixels, student.movedim(1, -1), teacher.movedim(1, -1)
        elif layouts:
            rows = tokens
        else:
            raise DistillError(
                f"logits of shape {tuple(shape)} are either (batch, classes, length) or (batch, time, classes), and no "
                "labels tell which; give labels, Task(mask=...) for padded tokens, or Task(logits=...) that returns "
                "(positions, classes)"
            )
        student, teacher = (logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher))
    dense = target is not None and not target.is_floating_point() and target.shape == (rows or shape[:1])
    if dense and target is not None:
        target = target.reshape(-1)
    kept = mask.reshape(-1).bool() if mask is not None and rows is not None and mask.shape == rows else None
    if dense and target is not None and ignore_index is not None:
        counts = target != ignore_index
        kept = counts if kept is None else kept & counts
    if kept is None or bool(kept.all()):
        return student, teacher, target
    if not bool(kept.any()):
        raise DistillError("no position of a batch counts: all are masked, or all labels are the ignored one")
    return student[kept], teacher[kept], target[kept] if dense and target is not None else target
