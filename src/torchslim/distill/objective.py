"""The loss of a student: response, features, relations and labels, weighted."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchslim.core.batches import Batch, batch_size
from torchslim.core.distributed import gathered
from torchslim.core.isolation import differentiable_checkpoints
from torchslim.core.task import Task
from torchslim.distill.features.align import Masks, averaged, masked
from torchslim.distill.features.matching import Pair
from torchslim.distill.features.padding import masks_of
from torchslim.distill.features.probe import answer_padding
from torchslim.distill.features.taps import Tap, Watch, modules_by_path, watched
from torchslim.distill.losses.crd import CRD
from torchslim.distill.losses.feature import FeatureLoss
from torchslim.distill.losses.registry import Response, loss_name
from torchslim.distill.losses.relation import RelationLoss
from torchslim.distill.losses.response import KD, ResponseLoss, positions
from torchslim.distill.ruled_out import comparable
from torchslim.distill.teacher import Answer, Teacher, answer
from torchslim.errors import DistillError
from torchslim.training.loaders import Indexed
from torchslim.training.loop import Losses

RESERVED = ("label", "penalty", "response")

_Last = Sequence[tuple[Tensor, Tensor | None]]
"""The last feature of the student and of the teacher, each with its mask."""


@dataclass(frozen=True, slots=True)
class Part:
    """A loss on features, or on how they relate samples."""

    loss: Any
    kind: Literal["feature", "relation"]

    @property
    def name(self) -> str:
        """The name in logs and histories."""
        return loss_name(self.loss)

    @property
    def learns(self) -> bool:
        """Whether it is built for the shapes of the features."""
        return isinstance(self.loss, (FeatureLoss, CRD))

    @property
    def needs_places(self) -> bool:
        """Whether it keeps something for each sample of the data set."""
        return isinstance(self.loss, CRD)


class Companion(nn.Module):
    """Modules that train with the student without being part of it: projections, a memory bank, a moving average."""

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
        """Switch modes; the moving average, a teacher, stays in eval mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self


def free_name(name: str, taken: Container[str]) -> str:
    """`name`, numbered if another part has it; names of labels and penalties are reserved."""
    names = (f"{name}_{number}" if number > 1 else name for number in itertools.count(1))
    return next(numbered for numbered in names if numbered not in taken and numbered not in RESERVED)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of a distillation loss and their settings.

    Attributes:
        response: the loss on outputs, if any.
        parts: losses on features and relations.
        pairs: the compared features of student and teacher.
        label_weight: the factor of the task's own loss; 0 leaves it out.
        ignore_index: the label of positions that count nowhere.
        teacher_weights: a number for each teacher; empty for equal ones.
    """

    response: ResponseLoss | Response | None
    parts: Sequence[Part]
    pairs: Sequence[Pair]
    label_weight: float
    ignore_index: int
    teacher_weights: Sequence[float]


class DistillObjective:
    """The named losses of a student on one batch; `watching` must be entered first."""

    def __init__(self, task: Task, teacher: Teacher, terms: Terms, companion: Companion) -> None:
        self.task, self.teacher, self.terms, self.companion = task, teacher, terms, companion
        self.response, self.parts, self.pairs = terms.response, terms.parts, terms.pairs
        self.taps = [pair.student for pair in terms.pairs]
        self.watch = Watch(tap.path for tap in self.taps)
        self.padding: Any = None
        self.owners: Mapping[str, nn.Module] = {}
        self.checked = False

    @contextmanager
    def watching(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Record the student's features inside the block; `batch` shows where padding stands in the outputs."""
        self.owners = modules_by_path(model)
        with ExitStack() as stack:
            if self.taps:
                stack.enter_context(differentiable_checkpoints())  # else features inside them would have no gradient
                stack.enter_context(watched(model, self.watch.keep, self.watch.outputs))
                self.watch.rehearse(model, lambda: answer(self.task, model, batch))
            if isinstance(self.response, ResponseLoss):
                self.padding = answer_padding(model, self.task, batch)
            yield

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        index = None
        if isinstance(batch, Indexed):
            index, batch = batch
        samples = batch_size(self.task.inputs(batch))
        if index is not None and len(index) != samples:
            raise DistillError(
                f"the loader's collate_fn returned {samples} of {len(index)} samples; cache and CRD need all of them: "
                "keep them, or leave cache and CRD out"
            )
        self.watch.clear()
        outputs = self.task.forward(model, batch)
        logits = self.task.logits(outputs)
        needed = self.response is not None and not (isinstance(self.response, KD) and self.response.alpha == 0)
        losses: dict[str, Tensor] = {}
        target = self.task.target(batch)
        if needed or self.parts:
            taught, masks = self.teacher(batch, index, logits.device), masks_of(self.task, batch)
            if needed:
                losses["response"] = self._response(logits, taught.logits, target, masks)
            if self.parts:
                if len(logits) % samples:
                    raise DistillError(
                        f"the inputs' first dimension is {samples}, the logits' {len(logits)}; both must be the "
                        "batch size: change the batches, or give Task(inputs=...) or Task(logits=...)"
                    )
                index = torch.arange(samples) if index is None else index
                self._features(model, logits, taught, index.to(logits.device), batch, masks, losses)
        self.watch.clear()
        if self.terms.label_weight > 0:
            label = self.task.compute_loss(outputs, batch)
            if label is None:
                raise DistillError("a batch has no labels, but label_weight is above 0")
            losses["label"] = self.terms.label_weight * label
        return losses

    def _response(
        self, student: Tensor, teachers: Sequence[Tensor], target: Tensor | None, masks: Sequence[Tensor | None]
    ) -> Tensor:
        weights = self.terms.teacher_weights or [1.0] * len(teachers)
        weights = [weight / sum(weights) for weight in weights]
        loss = self.response
        if not isinstance(loss, ResponseLoss):
            assert loss is not None
            mean = sum(weight * logits for weight, logits in zip(weights, teachers, strict=True))
            return loss(student, mean if len(teachers) > 1 else teachers[0], target)  # type: ignore[arg-type]
        mask = None if self.padding is None else self.padding.over(masks, student)
        rows = [positions(student, logits, target, mask, self.terms.ignore_index) for logits in teachers]
        student, teacher, target = rows[0]
        if len(rows) > 1:
            teacher = loss.blend([logits for _, logits, _ in rows], weights)
        if getattr(loss, "gather", False):
            student, teacher = gathered(student), gathered(teacher)
        return loss.soft(student, teacher, target)

    def _features(
        self,
        model: nn.Module,
        logits: Tensor,
        taught: Answer,
        index: Tensor,
        batch: Batch,
        masks: Sequence[Tensor | None],
        losses: dict[str, Tensor],
    ) -> None:
        """Add the losses on features and on relations: 0 where a layer was dropped, or samples are too few."""
        students, teachers = self.watch.features(self.taps), taught.features
        self._check_gradients(students)
        pairs = [
            (one, two) if one is None else comparable(one, two) for one, two in zip(students, teachers, strict=True)
        ]
        students, teachers = [one for one, _ in pairs], [two for _, two in pairs]
        ours, theirs = (
            [_over(tap, masks, feature) for tap, feature in zip(taps, features, strict=True)]
            for taps, features in ((self.taps, students), ([pair.teacher for pair in self.pairs], teachers))
        )
        left, right = (students[-1], teachers[-1]) if self.pairs else (logits, taught.logits[0])
        last = None
        if left is not None:
            left, right = comparable(left, right)
            padding = (ours[-1], theirs[-1]) if self.pairs else (None, None)
            last = (masked(left, padding[0]), padding[0]), (masked(right, padding[1]), padding[1])
        for number, part in enumerate(self.parts):
            learned = self.companion.learned[str(number)] if part.learns else None
            value = None
            if part.kind == "relation" and last is not None:
                value = self._relation(part.loss, learned, last, index, batch, model.training)
            elif part.kind == "feature":
                value = _compared(part.loss, learned, students, teachers, list(zip(ours, theirs, strict=True)))
            losses[free_name(part.name, losses)] = logits.flatten()[:0].sum() if value is None else value

    def _relation(
        self, loss: Any, learned: nn.Module | None, last: _Last, index: Tensor, batch: Batch, training: bool
    ) -> Tensor | None:
        if learned is not None:
            vectors = [feature if mask is None else averaged(feature, mask)[0] for feature, mask in last]
            value: Tensor = learned(*vectors, index, self._classes(batch))
            return value
        student, teacher = (feature for feature, _ in last)
        if getattr(loss, "gather", False):
            student, teacher = gathered(student.flatten(1)), gathered(teacher.flatten(1))
        # the last batch of an epoch may be small; the check before the training refuses other small batches
        few = isinstance(loss, RelationLoss) and len(student) < loss.least and training
        return None if few else loss(student, teacher)

    def _check_gradients(self, students: Sequence[Tensor | None]) -> None:
        """Raise, at the first call, for features that cannot be learned."""
        if self.checked or not torch.is_grad_enabled():
            return
        self.checked = True
        for tap, feature in zip(self.taps, students, strict=True):
            owner = self.owners.get(tap.path)
            learns = owner is not None and any(parameter.requires_grad for parameter in owner.parameters())
            if feature is not None and learns and not feature.requires_grad:
                raise DistillError(
                    f"the output of {tap.name!r} carries no gradient, so nothing learns from it; compute it without "
                    "torch.no_grad, or tap a module outside of that block"
                )

    def _classes(self, batch: Batch) -> Tensor | None:
        """The class of each sample, where it has one."""
        target = self.task.target(batch)
        single = target is not None and not target.is_floating_point() and target.dim() == 1
        return target if single else None


def _over(tap: Tap, masks: Sequence[Tensor | None], feature: Tensor | None) -> Tensor | None:
    """Which positions of a feature count; None where all do."""
    return None if feature is None or tap.padding is None else tap.padding.over(masks, feature.shape[2:])


def _compared(
    loss: Any,
    learned: nn.Module | None,
    students: Sequence[Tensor | None],
    teachers: Sequence[Tensor],
    masks: Sequence[Masks],
) -> Tensor | None:
    """The value of a feature loss, computed by its own module if it has one; None where a layer was dropped."""
    features = [student for student in students if student is not None]
    if len(features) < len(students):
        return None
    value: Tensor = loss(features, teachers) if learned is None else learned(features, teachers, masks)
    return value
