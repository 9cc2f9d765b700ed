"""The distillation step: the student trains on what the teacher says, and on the labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from torchslim.distill.losses import Response, find_response
from torchslim.distill.response import KD, ResponseLoss, positions
from torchslim.errors import DistillError
from torchslim.isolation import copy_model
from torchslim.loaders import first_batch
from torchslim.steps import Context, Form, Outcome
from torchslim.task import Batch, Task, predictor
from torchslim.training import Losses, Objective, Training, trained


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Train the model on the outputs of the context's teacher (by default the original model).

    Padding that `Task.mask` marks, and positions with the label `ignore_index`, are left out of the response of dense
    outputs.

    Args:
        response: KD(...), DKD(...), DIST(...), MSE(...), or one of their names; a function (student logits, teacher
            logits, labels) -> scalar, or "package.module:name".
        label_weight: the weight of the task's own loss; by default 1 - alpha for KD, 1 for the other losses, and 0 for
            a function, which is handed the labels and may use them itself.
        ignore_index: the label of positions that do not count, as PyTorch's cross entropy has it.
    """

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.MODULE

    response: ResponseLoss | Response | str = field(default_factory=KD)
    label_weight: float | None = None
    ignore_index: int = -100

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
        return _ResponseObjective(
            ctx.task, teacher.eval(), find_response(self.response), self.resolved_label_weight(), self.ignore_index
        )

    def check(self, ctx: Context) -> None:
        """There is data to train on, labels where they count, and a teacher that answers."""
        self.check_training(ctx)

    def check_training(self, ctx: Context) -> None:
        """As `check`, for other steps that train by distillation."""
        Training.check_training(self, ctx)
        response, batch = find_response(self.response), first_batch(ctx.task)
        if getattr(response, "needs_labels", False) and ctx.task.target(batch) is None:
            raise DistillError(
                f"{type(response).__name__} needs labels, but Task.target gives None; use KD(alpha=1), which needs none"
            )
        if self.resolved_label_weight() > 0 and ctx.task.loss is None and ctx.task.target(batch) is None:
            raise DistillError(
                f"the labels have weight {self.resolved_label_weight():g}, but Task.target gives None; set alpha=1 "
                "or label_weight=0"
            )

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        return trained(model, ctx, self.fit(model, ctx))


class _ResponseObjective:
    """The teacher runs in eval mode, without gradients, on the student's batch."""

    def __init__(
        self,
        task: Task,
        teacher: nn.Module,
        response: ResponseLoss | Response,
        label_weight: float,
        ignore_index: int,
    ) -> None:
        self.task, self.teacher, self.response, self.label_weight = task, teacher, response, label_weight
        self.ignore_index = ignore_index
        self.predict = predictor(teacher)

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        outputs = self.task.forward(model, batch)
        student = self.task.logits(outputs)
        self.teacher.to(student.device)
        teacher = self.task.logits(self.task.forward(self.predict, batch))
        parts: dict[str, torch.Tensor] = {}
        target = self.task.target(batch)
        if not isinstance(self.response, ResponseLoss):
            parts["response"] = self.response(student, teacher, target)
        elif not (isinstance(self.response, KD) and self.response.alpha == 0):
            mask = self.task.mask(batch)
            parts["response"] = self.response.soft(*positions(student, teacher, target, mask, self.ignore_index))
        if self.label_weight > 0:
            label = self.task.compute_loss(outputs, batch)
            if label is None:
                raise DistillError("a batch has no labels, but label_weight is above 0")
            parts["label"] = self.label_weight * label
        return parts
