"""The distillation step: the student trains on the teacher's outputs and features, and on the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from torchslim.core.batches import batch_size
from torchslim.core.checks import check_fields
from torchslim.core.isolation import copy_model, preserved_globals
from torchslim.core.step import Context, Form, LayerRecord, Outcome
from torchslim.core.task import Task
from torchslim.core.trees import device_of, to_device
from torchslim.core.usable import usable
from torchslim.distill.features.matching import Pair, match
from torchslim.distill.features.probe import observe
from torchslim.distill.features.taps import dry
from torchslim.distill.losses.crd import CRD
from torchslim.distill.losses.registry import Feature, Relation, Response, find_loss, find_response
from torchslim.distill.losses.response import KD, ResponseLoss
from torchslim.distill.objective import Companion, DistillObjective, Part, Terms
from torchslim.distill.teacher import Average, Remembering, Teacher, Teachers, WriteCache, find_module
from torchslim.errors import DistillError
from torchslim.training.finetune import Lesson, Training, trained
from torchslim.training.loaders import first_batch, indexed, sample_count, why_not_numbered, why_not_repeatable
from torchslim.training.loop import Hook

EMA = "ema"


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Train the model to match a teacher's outputs, its features, and its relations between samples.

    The loss is the sum of all parts and of the task's own loss on the labels; the report lists each term. Padding that
    `Task.mask` marks, and positions with the label `ignore_index`, are left out. The teacher runs in eval mode and is
    not changed.

    Args:
        response: KD(...), DKD(...), DIST(...), MSE(...), or one of their names; a function (student logits, teacher
            logits, labels) -> scalar, or "package.module:name"; None for no response loss.
        feature: Hint(...), AttentionTransfer(...) and so on, one or several; or functions (student features, teacher
            features) -> scalar, of lists with one tensor (batch, channels, *positions) for each tap. Weights that a
            loss learns, such as projections, are not part of the returned model.
        relation: RKD(...), CRD(...) and so on, one or several, of the last tap's features (of the logits where
            nothing can be tapped); or functions (student, teacher) -> scalar.
        taps: which student feature learns from which teacher feature, by module path, student's to teacher's; `*`
            stands for a part of a path, "path[2]" for the third call of a module. None: by name where the student was
            pruned from its teacher, else stage by stage. The report lists the pairs. A network wrapped by
            torch.compile runs uncompiled while it is tapped.
        label_weight: weight of the task's own loss; by default 1 - alpha for KD, 1 for the other losses, and 0 for a
            function, which receives the labels and may use them itself.
        ignore_index: label of positions that do not count, as in PyTorch's cross entropy.
        teacher: by default the context's (the original model); a module, "package.module:callable", or several, whose
            softened outputs are averaged (features and relations are learned from the first); or "ema", the student's
            own moving average.
        teacher_weights: weights of several teachers, scaled to sum to 1.
        ema_decay: fraction of the moving average that stays at each step.
        student: a network of another architecture that is trained and returned in place of the model: a module or
            "package.module:callable".
        cache: folder for the teacher's outputs by sample: later epochs, and later runs with the same teacher, do not
            run the teacher again. Needs a loader that gives the same sample each time.
    """

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.MODULE

    response: ResponseLoss | Response | str | None = field(default_factory=KD)
    feature: Feature | str | tuple[Feature | str, ...] | list[Feature | str] = ()
    relation: Relation | str | tuple[Relation | str, ...] | list[Relation | str] = ()
    taps: Mapping[str, str] | None = field(default=None, hash=False)
    label_weight: float | None = None
    ignore_index: int = -100
    teacher: nn.Module | str | tuple[nn.Module | str, ...] | list[nn.Module | str] | None = None
    teacher_weights: tuple[float, ...] | list[float] | None = None
    ema_decay: float = 0.999
    student: nn.Module | str | None = None
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        check_fields(self, DistillError)
        # zero-argument super() fails in a dataclass that is rebuilt for slots in a subclass
        Training.__post_init__(self)
        for name in ("feature", "relation", "teacher", "teacher_weights"):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, (tuple, list)) else () if value is None else (value,)
            object.__setattr__(self, name, values)
        for name in ("feature", "relation"):
            for loss in getattr(self, name):
                if not (isinstance(loss, str) and ":" in loss):  # imported only when a run is checked
                    find_loss(loss, name)
        if self.label_weight is not None and not 0 <= self.label_weight < float("inf"):
            raise DistillError(f"label_weight must be a finite number of at least 0, got {self.label_weight}")
        if not 0 <= self.ema_decay < 1:
            raise DistillError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        self._check_teachers()
        if self.taps is not None and not self.taps:
            raise DistillError("taps is empty; name a module of each side, or leave taps out to find them by rule")
        if self.taps and not (self.feature or self.relation):
            raise DistillError(
                "taps name features, but no loss compares any; give feature or relation, or leave taps out"
            )
        if self.cache is not None and Path(self.cache).exists() and not Path(self.cache).is_dir():
            raise DistillError(f"cache must be a folder, {str(self.cache)!r} is a file; name another")
        if isinstance(self.response, str) and ":" in self.response:
            return  # imported only when a run is checked
        response = None if self.response is None else find_response(self.response)
        silent = response is None or (isinstance(response, KD) and response.alpha == 0)
        if silent and not self.feature and not self.relation and self.resolved_label_weight() == 0:
            raise DistillError(
                "nothing to learn from: alpha=0 and label_weight=0; raise one of them, or give feature or relation"
            )

    def _check_teachers(self) -> None:
        teachers, weights = self._several("teacher"), self._several("teacher_weights")
        for name, model in (*(("the teacher", teacher) for teacher in teachers), ("the student", self.student)):
            if isinstance(model, nn.Module):
                usable(model, DistillError, name)
        if weights and (len(weights) != len(teachers) or min(weights) < 0 or not 0 < sum(weights) < float("inf")):
            raise DistillError(
                f"teacher_weights must be finite, none negative, and one for each of the {len(teachers)} teachers, got "
                f"{weights}"
            )
        if EMA in teachers and (len(teachers) > 1 or self.cache is not None):
            raise DistillError("teacher='ema' changes at every step; use it without other teachers and without cache")

    def rehearsed(self, folder: Path) -> Self:
        """Return the same training for one epoch; outputs of teachers are cached in `folder` if they are at all."""
        # zero-argument super() fails in a dataclass that is rebuilt for slots in a subclass
        return replace(Training.rehearsed(self, folder), cache=None if self.cache is None else folder / "teacher")

    def _several(self, name: str) -> tuple[Any, ...]:
        values: tuple[Any, ...] = getattr(self, name)
        return values

    def resolved_label_weight(self) -> float:
        """Weight of the task's own loss on the labels."""
        if self.label_weight is not None:
            return self.label_weight
        if self.response is None:
            return 1.0
        return getattr(find_response(self.response), "label_weight", 0.0)

    def initial_model(self, model: nn.Module, seed: int) -> nn.Module:
        """Model that the step trains: `model`, or a new student, which is the same for equal seeds."""
        if self.student is None:
            return model
        with preserved_globals(seed):
            return find_module(self.student, "student")

    @contextmanager
    def lesson(self, model: nn.Module, ctx: Context) -> Iterator[Lesson]:
        """Yield the weighted losses on teacher and labels; the taps are removed after the block."""
        response = None if self.response is None else find_response(self.response)
        features = [find_loss(loss, "feature") for loss in self._several("feature")]
        relations = [find_loss(loss, "relation") for loss in self._several("relation")]
        task, batches = ctx.task, ctx.task.train if ctx.task.train is not None else ()
        average = Average(model, self.ema_decay) if self._several("teacher") == (EMA,) else None
        teachers = [average.module] if average else self._teachers(ctx)
        pairs: list[Pair] = []
        batch = first_batch(task)
        if features or relations:
            pairs = match(observe(model, task, batch), observe(teachers[0], task, batch), self.taps)
            if not pairs and features:
                raise DistillError("nothing in student and teacher can be tapped; name the modules to compare in taps")
            pairs = pairs if features else pairs[-1:]
        hooks: list[Hook] = [average] if average else []
        with ExitStack() as stack:
            live = Teachers(task, teachers, [pair.teacher for pair in pairs], stack, batch)
            teacher: Teacher = live
            if self.cache is not None:
                remembering = Remembering(live, Path(self.cache))
                teacher = remembering
                hooks.append(WriteCache(remembering.cache))
            parts = [Part(feature, "feature") for feature in features] + [
                Part(relation, "relation") for relation in relations
            ]
            places = 0
            if any(part.needs_places for part in parts):
                places = sample_count(batches, _size(task))
            with preserved_globals(ctx.seed):  # projections start from the same weights each time
                companion = Companion(parts, pairs, places, average.module if average else None)
            terms = Terms(
                response=response,
                parts=parts,
                pairs=pairs,
                label_weight=self.resolved_label_weight(),
                ignore_index=self.ignore_index,
                teacher_weights=self._several("teacher_weights"),
            )
            objective = DistillObjective(task, teacher, terms, companion)
            stack.enter_context(objective.watching(model, batch))
            yield Lesson(
                objective=objective,
                batches=indexed(batches, _size(task)) if places or self.cache is not None else batches,
                companion=companion,
                hooks=hooks,
                layers=[
                    LayerRecord(layer=pair.student.name, action="trained", reason=f"taught by {pair}") for pair in pairs
                ],
            )

    def _teachers(self, ctx: Context) -> list[nn.Module]:
        teachers = self._several("teacher") or (ctx.teacher,)
        return [find_module(teacher, "teacher").eval() for teacher in teachers]

    def check(self, ctx: Context) -> None:
        """Raise unless there are training data, labels where they count, and a teacher the student can learn from."""
        model = self.initial_model(ctx.model if ctx.model is not None else ctx.teacher, ctx.seed)
        replace(self, student=None).check_training(replace(ctx, model=model))

    def check_training(self, ctx: Context) -> None:
        """Check as `check` does, for other steps that train by distillation."""
        Training.check_training(self, ctx)
        if self.student is not None:
            raise DistillError("student is only for Distill as a step; in the training of another step, leave it out")
        response, batch = None if self.response is None else find_response(self.response), first_batch(ctx.task)
        target = ctx.task.target(batch)
        if getattr(response, "needs_labels", False) and target is None:
            raise DistillError(
                f"{type(response).__name__} needs labels, but Task.target gives None; use KD(alpha=1), which needs none"
            )
        if self.resolved_label_weight() > 0 and ctx.task.loss is None and target is None:
            raise DistillError(
                f"the labels have weight {self.resolved_label_weight():g}, but Task.target gives None; set "
                f"{'alpha=1 or ' if isinstance(response, KD) else ''}label_weight=0"
            )
        train = () if ctx.task.train is None else ctx.task.train
        if self.cache is not None and (why := why_not_repeatable(train, _size(ctx.task))):
            raise DistillError(f"cache needs the same sample each time, but {why}; leave out cache, or the random part")
        crd = any(isinstance(find_loss(loss, "relation"), CRD) for loss in self._several("relation"))
        if crd and (why := why_not_numbered(train, _size(ctx.task))):
            raise DistillError(f"CRD stores features by sample, but {why}; give a plain DataLoader, or another loss")
        model = copy_model(ctx.model if ctx.model is not None else ctx.teacher)[0]
        # compute the loss once, so that its errors, such as different classes, are raised before the training
        with replace(self, cache=None).lesson(model, ctx) as lesson, dry(model):
            assert lesson.companion is not None
            device = device_of(model)
            lesson.companion.to(device).eval()
            lesson.objective(model, to_device(batch, device))

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        if self.student is not None:
            model, ctx = self.initial_model(model, ctx.seed), replace(ctx, masks={})
        return trained(model, ctx, replace(self, student=None).fit(model, ctx))


def _size(task: Task) -> Any:
    return lambda batch: batch_size(task.inputs(batch))
