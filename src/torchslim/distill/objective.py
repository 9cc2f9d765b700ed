"""What a student is trained on: response, features, relations and labels, each with its weight."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchslim.distill.contrast import CRD
from torchslim.distill.feature import FeatureLoss
from torchslim.distill.losses import Response, loss_name
from torchslim.distill.matching import Pair
from torchslim.distill.response import KD, ResponseLoss, positions
from torchslim.distill.taps import Watch, watched
from torchslim.distill.teachers import Teacher, answer
from torchslim.errors import DistillError
from torchslim.loaders import Indexed
from torchslim.processes import gathered
from torchslim.task import Batch, Task
from torchslim.training import Losses

RESERVED = ("label", "penalty", "response")


@dataclass(frozen=True, slots=True)
class Part:
    """A loss on features, or on how they relate samples."""

    loss: Any
    kind: Literal["feature", "relation"]

    @property
    def name(self) -> str:
        """As it is logged."""
        return loss_name(self.loss)

    @property
    def learns(self) -> bool:
        """Is it built for the features' shapes?"""
        return isinstance(self.loss, (FeatureLoss, CRD))

    @property
    def needs_places(self) -> bool:
        """Does it keep something for each sample of the data set?"""
        return isinstance(self.loss, CRD)


class Companion(nn.Module):
    """What learns along with the student and is no part of it: projections, a memory bank, a moving average."""

    def __init__(self, parts: Sequence[Part], pairs: Sequence[Pair], places: int, average: nn.Module | None) -> None:
        super().__init__()
        self.learned = nn.ModuleDict()
        for number, part in enumerate(parts):
            if isinstance(part.loss, FeatureLoss):
                self.learned[str(number)] = part.loss.build([pair.shapes for pair in pairs])
            elif isinstance(part.loss, CRD):
                if not pairs:
                    raise DistillError("CRD compares features, but nothing can be tapped; name a tap on each side")
                self.learned[str(number)] = part.loss.build(*pairs[-1].shapes, places)
        self.average = average

    def train(self, mode: bool = True) -> Companion:
        """The moving average answers as a teacher does."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self


def free_name(name: str, taken: Container[str]) -> str:
    """The name, numbered where a part has it already; those of the labels and of penalties are never a part's."""
    names = (f"{name}_{number}" if number > 1 else name for number in itertools.count(1))
    return next(each for each in names if each not in taken and each not in RESERVED)


class Everything:
    """All parts of the loss on one batch, by name."""

    def __init__(
        self,
        task: Task,
        teacher: Teacher,
        response: ResponseLoss | Response | None,
        parts: Sequence[Part],
        pairs: Sequence[Pair],
        companion: Companion,
        label_weight: float,
        ignore_index: int,
        weights: Sequence[float],
        model: nn.Module,
        stack: ExitStack,
    ) -> None:
        self.task, self.teacher, self.response, self.parts, self.pairs = task, teacher, response, parts, pairs
        self.companion, self.label_weight, self.ignore_index, self.weights = (
            companion, label_weight, ignore_index, weights
        )  # fmt: skip
        self.taps = [pair.student for pair in pairs]
        self.watch = Watch(tap.path for tap in self.taps)
        if self.taps:
            stack.enter_context(watched(model, self.watch.keep, self.watch.outputs))
            self.watch.rehearse(model, lambda: answer(task, model))

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        index = None
        if isinstance(batch, Indexed):
            index, batch = batch
        self.watch.clear()
        outputs = self.task.forward(model, batch)
        logits = self.task.logits(outputs)
        needed = self.response is not None and not (isinstance(self.response, KD) and self.response.alpha == 0)
        losses: dict[str, Tensor] = {}
        target = self.task.target(batch)
        if needed or self.parts:
            said = self.teacher(batch, index, logits.device)
            if needed:
                losses["response"] = self._response(logits, said.logits, target, self.task.mask(batch))
            if self.parts:
                index = torch.arange(len(logits)) if index is None else index
                self._features(logits, said.logits[0], said.features, index.to(logits.device), batch, losses)
        self.watch.clear()
        if self.label_weight > 0:
            label = self.task.compute_loss(outputs, batch)
            if label is None:
                raise DistillError("a batch has no labels, but label_weight is above 0")
            losses["label"] = self.label_weight * label
        return losses

    def _response(
        self, student: Tensor, teachers: Sequence[Tensor], target: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        weights = self.weights or [1.0] * len(teachers)
        weights = [weight / sum(weights) for weight in weights]
        loss = self.response
        if not isinstance(loss, ResponseLoss):
            assert loss is not None
            mean = sum(weight * each for weight, each in zip(weights, teachers, strict=True))
            return loss(student, mean if len(teachers) > 1 else teachers[0], target)  # type: ignore[arg-type]
        rows = [positions(student, each, target, mask, self.ignore_index) for each in teachers]
        student, teacher, target = rows[0]
        if len(rows) > 1:
            teacher = loss.blend([each for _, each, _ in rows], weights)
        if getattr(loss, "gather", False):
            student, teacher = gathered(student), gathered(teacher)
        return loss.soft(student, teacher, target)

    def _features(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        teachers: Sequence[Tensor],
        index: Tensor,
        batch: Batch,
        losses: dict[str, Tensor],
    ) -> None:
        """Add the losses on features and on relations."""
        students = self.watch.features(self.taps)
        masks = [self._mask(batch, each) for each in students]
        last = (students[-1], teachers[-1]) if students else (student_logits, teacher_logits)
        if students and masks[-1] is not None:
            last = (_masked(last[0], masks[-1]), _masked(last[1], self._mask(batch, last[1])))
        for number, part in enumerate(self.parts):
            learned = self.companion.learned[str(number)] if part.learns else None
            if isinstance(part.loss, CRD):
                assert learned is not None
                value = learned(*last, index, self._classes(batch))
            elif learned is not None:
                value = learned(students, teachers, masks)
            elif part.kind == "feature":
                value = part.loss(students, teachers)
            elif getattr(part.loss, "gather", False):
                value = part.loss(gathered(last[0].flatten(1)), gathered(last[1].flatten(1)))
            else:
                value = part.loss(*last)
            losses[free_name(part.name, losses)] = value

    def _mask(self, batch: Batch, feature: Tensor) -> Tensor | None:
        """Which positions of a feature count, where the task's mask is of its positions."""
        mask = self.task.mask(batch)
        return mask.bool() if mask is not None and mask.shape == (len(feature), *feature.shape[2:]) else None

    def _classes(self, batch: Batch) -> Tensor | None:
        """The class of each sample, where it has one."""
        target = self.task.target(batch)
        single = target is not None and not target.is_floating_point() and target.dim() == 1
        return target if single else None


def _masked(feature: Tensor, mask: Tensor | None) -> Tensor:
    return feature if mask is None else feature * mask.unsqueeze(1).to(feature.dtype)
