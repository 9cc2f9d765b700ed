"""Distillation losses: frozen dataclasses that are at once config, recipe schema and function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from torchslim.errors import DistillError
from torchslim.steps import resolve
from torchslim.task import default_loss

Response = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(student logits, teacher logits, labels or None) -> scalar."""


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean over the batch of KL(teacher || student) of the softened outputs, times temperature squared.

    The square keeps the gradient's size independent of the temperature. No gradient reaches the teacher.

    Shapes: (batch, classes), (batch, classes) -> (). Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2.
    """
    if student.shape != teacher.shape:
        raise DistillError(
            f"student and teacher logits differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}; response "
            "distillation needs the same classes"
        )
    log_student = functional.log_softmax(student / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher.detach() / temperature, dim=1)
    return (
        functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KD:
    """Soft-target distillation: (1 - alpha) * cross entropy + alpha * T^2 * KL(teacher || student).

    With labels None, alpha must be 1. Inside `Distill` the label term is the task's own loss.

    Shapes: (batch, classes), (batch, classes), (batch,) or None -> ().
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
        """The teacher's term alone, weighted."""
        return self.alpha * kl_divergence(student, teacher, temperature=self.temperature)

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        if self.label_weight == 0:
            return self.soft(student, teacher)
        if target is None:
            raise DistillError(
                f"alpha={self.alpha} leaves weight to the labels, but there are none; set alpha=1"
            )
        return self.label_weight * default_loss(student, target) + self.soft(student, teacher)


LOSSES: Mapping[str, type] = {"kd": KD}


def find_response(response: str | KD | Response) -> KD | Response:
    """A response loss as it is, by name, or by "package.module:name"."""
    if not isinstance(response, str):
        return response
    if response in LOSSES:
        made: KD = LOSSES[response]()
        return made
    if ":" in response:
        found: Response = resolve(response, "response", DistillError)
        return found() if isinstance(found, type) else found
    raise DistillError(
        f"response {response!r} is not known; one of {', '.join(LOSSES)}, or 'package.module:name'"
    )
