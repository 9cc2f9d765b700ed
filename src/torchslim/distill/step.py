"""The distillation step: the student trains on what the teacher says, and on the labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from torchslim.distill.losses import KD, Response, classes_second, find_response
from torchslim.errors import DistillError
from torchslim.isolation import copy_model
from torchslim.loaders import first_batch
from torchslim.steps import Context, Form, Outcome
from torchslim.task import Batch, Task, predictor
from torchslim.training import Losses, Objective, Training, trained


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Train the model on the outputs of the context's teacher (by default the original model).

    Padding that `Task.mask` marks is left out of the KD term of token outputs.

    Args:
        response: KD(...), a function (student logits, teacher logits, labels) -> scalar, or "package.module:name".
        label_weight: the weight of the task's own loss; by default 1 - alpha for KD, and 0 for a function, which
            is handed the labels and may use them itself.
    """

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.MODULE

    response: KD | Response | str = field(default_factory=KD)
    label_weight: float | None = None

    def __post_init__(self) -> None:
        # zero-argument super() is at odds with a dataclass that is rebuilt for slots in a subclass
        Training.__post_init__(self)
        if self.label_weight is not None and not 0 <= self.label_weight < float("inf"):
            raise DistillError(f"label_weight must be a finite number of at least 0, got {self.label_weight}")
        if isinstance(self.response, str) and ":" in self.response:
            return  # imported only when a run is checked
        response = find_response(self.response)
        if isinstance(response, KD) and response.alpha == 0 and self.resolved_label_weight() == 0:
            raise DistillError("nothing to learn from: alpha=0 and label_weight=0; raise one of them")

    def resolved_label_weight(self) -> float:
        """How much the labels count."""
        if self.label_weight is not None:
            return self.label_weight
        return getattr(find_response(self.response), "label_weight", 0.0)

    def objective(self, ctx: Context) -> Objective:
        """Teacher and labels, each with its weight."""
        teacher, _ = copy_model(ctx.teacher)
        return _ResponseObjective(ctx.task, teacher.eval(), find_response(self.response), self.resolved_label_weight())

    def check(self, ctx: Context) -> None:
        """There is data to train on, labels where they count, and a teacher that answers."""
        self.check_training(ctx)

    def check_training(self, ctx: Context) -> None:
        """As `check`, for other steps that train by distillation."""
        Training.check_training(self, ctx)
        find_response(self.response)
        batch = first_batch(ctx.task)
        if self.resolved_label_weight() > 0 and ctx.task.loss is None and ctx.task.target(batch) is None:
            raise DistillError(
                f"the labels have weight {self.resolved_label_weight():g}, but Task.target gives None; set alpha=1 "
                "or label_weight=0"
            )

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        return trained(model, ctx, self.fit(model, ctx))


class _ResponseObjective:
    """The teacher runs in eval mode, without gradients, on the student's batch."""

    def __init__(self, task: Task, teacher: nn.Module, response: KD | Response, label_weight: float) -> None:
        self.task, self.teacher, self.response, self.label_weight = task, teacher, response, label_weight
        self.predict = predictor(teacher)

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        outputs = self.task.forward(model, batch)
        student = self.task.logits(outputs)
        self.teacher.to(student.device)
        teacher = self.task.logits(self.task.forward(self.predict, batch))
        parts: dict[str, torch.Tensor] = {}
        if isinstance(self.response, KD):
            if self.response.alpha > 0:
                parts["response"] = self.response.soft(*self.positions(student, teacher, batch))
        else:
            parts["response"] = self.response(student, teacher, self.task.target(batch))
        if self.label_weight > 0:
            label = self.task.compute_loss(outputs, batch)
            if label is None:
                raise DistillError("a batch has no labels, but label_weight is above 0")
            parts["label"] = self.label_weight * label
        return parts

    def positions(
        self, student: torch.Tensor, teacher: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What of dense outputs is compared: classes in dimension 1, padding left out."""
        mask = self.task.mask(batch)
        tokens = student.dim() > 2 and student.shape == teacher.shape
        if tokens and mask is not None and mask.shape == student.shape[:-1]:
            return student[mask.bool()], teacher[mask.bool()]
        return classes_second(student, teacher, self.task.target(batch))
