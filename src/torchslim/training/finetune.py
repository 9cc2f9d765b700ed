"""Fine-tuning, and the fields and methods that all training steps share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from torchslim.core.batches import Batch
from torchslim.core.checks import check_fields
from torchslim.core.step import Context, Form, LayerRecord, Outcome
from torchslim.errors import TrainError
from torchslim.training.loaders import first_batch
from torchslim.training.loop import FitReport, Hook, LabelLoss, Objective, check_epochs, check_patience, fit
from torchslim.training.optimizer import OptimizerSettings

REHEARSED_LR = 1e-6
"""Learning rate of a rehearsal: a few updates leave the weights as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """The loss, data and hooks of a training.

    Attributes:
        objective: the loss.
        batches: training batches.
        companion: module trained jointly with the model and stored in its checkpoints, but not part of the model.
        hooks: hooks of the training loop.
        layers: records of which losses train which layers.
    """

    objective: Objective
    batches: Iterable[Batch]
    companion: nn.Module | None = None
    hooks: Sequence[Hook] = ()
    layers: Sequence[LayerRecord] = ()


@dataclass(frozen=True, kw_only=True)
class Training:
    """The fields that all training steps share; those of the optimizer are documented in `OptimizerSettings`.

    Args:
        keep: the weights of the best epoch by the metric on `val`, or of the last epoch.
        patience: end the training after so many epochs in a row that are not better than the best one; epochs in which
            a schedule is still running do not count. Needs keep="best".
    """

    written: ClassVar[str] = "Finetune(...) or Distill(...)"

    epochs: int = 3
    optimizer: Literal["sgd", "adamw"] | str | Callable[[Iterable[Any]], Optimizer] = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    clip_norm: float | None = None
    accumulate: int = 1
    average: float | None = None
    lr_scale: Mapping[str, float] = field(default_factory=dict, hash=False)
    keep: Literal["best", "last"] = "best"
    patience: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, TrainError)
        self.settings()
        check_epochs(self.epochs)
        check_patience(self.patience, evaluated=self.keep == "best")

    def settings(self) -> OptimizerSettings:
        """Return the checked fields of the optimizer."""
        return OptimizerSettings(**{field_.name: getattr(self, field_.name) for field_ in fields(OptimizerSettings)})

    @contextmanager
    def lesson(self, model: nn.Module, ctx: Context) -> Iterator[Lesson]:
        """Yield the lesson of `model`; whatever the lesson adds to the model is removed after the block."""
        raise NotImplementedError
        yield

    def trainings(self) -> list[int]:
        """Return the number of epochs of each training: here, of the only one."""
        return [self.epochs]

    def rehearsed(self, folder: Path) -> Self:
        """Return the same training for one epoch, at a learning rate that changes nothing and cannot diverge."""
        return replace(self, epochs=1, accumulate=1, lr=min(self.lr, REHEARSED_LR))  # a few batches are a few updates

    def check_training(self, ctx: Context) -> None:
        """Raise early for errors that training would meet: no data, no optimizer, patterns that match nothing."""
        first_batch(ctx.task)
        settings = self.settings()
        settings.factory()
        settings.check_patterns(ctx.model if ctx.model is not None else ctx.teacher)

    def fit(
        self,
        model: nn.Module,
        ctx: Context,
        *,
        hooks: Sequence[Hook] = (),
        masks: Mapping[str, Tensor] | None = None,
        phase: str = "train",
        part: int = 0,
    ) -> FitReport:
        """Train `model` in place on the context's task; `part` numbers several trainings in one step."""
        with self.lesson(model, ctx) as lesson:
            report = fit(
                model,
                lesson.batches,
                lesson.objective,
                epochs=self.epochs,
                settings=self.settings(),
                evaluate=ctx.task if self.keep == "best" else None,
                patience=self.patience,
                hooks=[*hooks, *lesson.hooks],
                masks=ctx.masks if masks is None else masks,
                companion=lesson.companion,
                state=ctx.state / f"{phase}-{part}.ckpt" if ctx.state else None,
                key=ctx.key,
                engine=ctx.engine,
                seed=ctx.seed + part,
                progress=ctx.progress,
                step_name=ctx.name,
                phase=phase,
            )
            ended = [LayerRecord(layer="", action="trained", reason=report.stopped)] if report.stopped else []
            return replace(report, layers=[*lesson.layers, *ended])


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Train on the labels with the task's own loss; the page "Training options" describes the fields."""

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.MODULE

    @contextmanager
    def lesson(self, model: nn.Module, ctx: Context) -> Iterator[Lesson]:
        """Yield the task's loss and training batches."""
        yield Lesson(objective=LabelLoss(ctx.task), batches=ctx.task.train if ctx.task.train is not None else ())

    def check(self, ctx: Context) -> None:
        """Raise unless the task has training batches with labels, or its own loss."""
        self.check_training(ctx)

    def check_training(self, ctx: Context) -> None:
        """Check as `check` does, for other steps that train on labels."""
        Training.check_training(self, ctx)
        if ctx.task.loss is None and ctx.task.target(first_batch(ctx.task)) is None:
            raise TrainError(
                "Finetune needs labels, but Task.target gives None; use Distill with alpha=1, or give Task(loss=...)"
            )

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        return trained(model, ctx, self.fit(model, ctx))


def trained(model: nn.Module, ctx: Context, report: FitReport) -> Outcome:
    """Make the outcome of a step that only trains."""
    reason = "last epoch" if report.best_epoch is None else f"best epoch {report.best_epoch}"
    record = LayerRecord(layer="", action="trained", reason=reason)
    return Outcome(model=model, masks=ctx.masks, layers=[record, *report.layers], history=report.history)
