"""Distillation losses: frozen dataclasses that are at once config, recipe schema and function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchslim.errors import DistillError
from torchslim.steps import resolve
from torchslim.task import default_loss

Response = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(student logits, teacher logits, labels or None) -> scalar."""


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean over the batch of KL(teacher || student) of the softened outputs, times temperature squared.

    The square keeps the gradient's size independent of the temperature. No gradient reaches the teacher. Dense
    outputs count each position as a sample; half precision is computed in float32.

    Shapes: (batch, classes, ...), (batch, classes, ...) -> ().
    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2.
    """
    if student.shape != teacher.shape:
        raise DistillError(
            f"student and teacher logits differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}; response "
            "distillation needs the same classes"
        )
    if student.dim() < 2 or student.shape[1] < 2:
        raise DistillError(
            f"a response loss compares at least two classes, got logits of shape {tuple(student.shape)}; for other "
            "outputs give a function of your own, such as response=lambda s, t, y: mse_loss(s, t)"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_student = functional.log_softmax(student.to(dtype) / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher.detach().to(dtype) / temperature, dim=1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.sum(1).mean() * temperature**2


def classes_second(student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both logits with the classes in dimension 1.

    Dense outputs are (batch, classes, ...) for images and (batch, time, classes) for tokens; the labels' shape tells.

    Raises:
        DistillError: three dimensions, and no labels that tell.
    """
    shape, labels = student.shape, None if target is None else target.shape
    if len(shape) <= 2 or shape != teacher.shape or labels == shape[:1] + shape[2:]:
        return student, teacher
    if labels == shape[:-1]:
        return student.movedim(-1, 1), teacher.movedim(-1, 1)
    if len(shape) == 3:
        raise DistillError(
            f"logits of shape {tuple(shape)} are either (batch, classes, length) or (batch, time, classes), and no "
            "labels tell which; give labels, Task(mask=...) for padded tokens, or Task(logits=...) that returns "
            "(positions, classes)"
        )
    return student, teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class KD:
    """Soft-target distillation: (1 - alpha) * cross entropy + alpha * T^2 * KL(teacher || student).

    With labels None, alpha must be 1. Inside `Distill` the label term is the task's own loss.

    Shapes: (batch, classes), (batch, classes), (batch,) or None -> (). Dense: (batch, classes, ...) with labels
    (batch, ...), or tokens (batch, time, classes) with labels (batch, time).
    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2.

    >>> import torch
    >>> logits = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    >>> KD(alpha=1.0)(logits, logits, None).item()
    0.0
    """

    temperature: float = 4.0
    alpha: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise DistillError(f"temperature must be a finite number above 0, got {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise DistillError(f"alpha must be in [0, 1], the weight of the teacher, got {self.alpha}")

    @property
    def label_weight(self) -> float:
        """What is left for the labels."""
        return 1 - self.alpha

    def soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The teacher's term alone, weighted; classes in dimension 1."""
        return self.alpha * kl_divergence(student, teacher, temperature=self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        if self.label_weight > 0 and target is None:
            raise DistillError(f"alpha={self.alpha} leaves weight to the labels, but there are none; set alpha=1")
        soft = self.soft(*classes_second(student, teacher, target))
        if self.label_weight == 0 or target is None:
            return soft
        return self.label_weight * default_loss(student, target) + soft


LOSSES: Mapping[str, type] = {"kd": KD}


def find_response(response: str | KD | Response) -> KD | Response:
    """A response loss as it is, by name, or by "package.module:name"."""
    found: Any = response
    if isinstance(response, str):
        if response in LOSSES:
            found = LOSSES[response]()
        elif ":" in response:
            found = resolve(response, "response", DistillError)
            found = found() if isinstance(found, type) else found
        else:
            raise DistillError(
                f"response {response!r} is not known; one of {', '.join(LOSSES)}, or 'package.module:name'"
            )
    if isinstance(found, type) or not callable(found):
        raise DistillError(
            f"response must be KD(...) or a function (student logits, teacher logits, labels) -> scalar, got {found!r}"
        )
    made: KD | Response = found
    return made
