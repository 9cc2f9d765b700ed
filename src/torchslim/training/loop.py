"""The one training loop, on Lightning Fabric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchslim.core.arguments import checks_arguments
from torchslim.core.batches import Batch, checked, predictor
from torchslim.core.checks import shown
from torchslim.core.distributed import share
from torchslim.core.isolation import preserved_globals, seed_everything
from torchslim.core.step import Engine, Event, LayerRecord, log_progress
from torchslim.core.task import Task
from torchslim.core.train_modes import modes_restored
from torchslim.core.trees import device_of
from torchslim.core.usable import usable
from torchslim.errors import TrainError
from torchslim.training.averaging import WeightAverage
from torchslim.training.checkpoint import Record
from torchslim.training.devices import Placement, fabric_for, placed
from torchslim.training.loaders import length, seeded, shared
from torchslim.training.masks import MaskKeeper
from torchslim.training.optimizer import LR_SCALE, OptimizerSettings

MISTAKES = (TypeError, AttributeError, LookupError, ValueError)  # of an objective that takes or gives something else

Losses = Mapping[str, Tensor]
"""Named scalars; their sum is trained on, each is logged by itself."""


class Objective(Protocol):
    """Computes the named losses of a batch."""

    def __call__(self, model: nn.Module, batch: Batch) -> Losses: ...


@dataclass
class Loop:
    """The state of a running `fit` for hooks, which may replace entries of `masks`.

    With FSDP the model's parameters are DTensors, of which each process holds some rows; inside `with loop.whole():`
    the model is an ordinary one and may be changed.
    """

    model: nn.Module
    optimizer: Optimizer
    epochs: int
    masks: dict[str, Tensor] = field(default_factory=dict)
    steps_per_epoch: int | None = None  # for a loader without a length known after the first epoch
    epoch: int = 0  # finished epochs
    step: int = 0  # finished optimizer steps
    step_in_epoch: int = 0
    whole: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def progress(self) -> float:
        """Fraction of the training that is done, in [0, 1]; by whole epochs while an epoch's length is not known."""
        inside = min(self.step_in_epoch / self.steps_per_epoch, 1.0) if self.steps_per_epoch else 0.0
        return min((self.epoch + inside) / self.epochs, 1.0)

    @property
    def midpoint(self) -> float:
        """Progress in the middle of the next step, or of the epoch, from which the learning rate is computed.

        The start of a step would give the first step a learning rate of 0.
        """
        inside = min((self.step_in_epoch + 0.5) / self.steps_per_epoch, 1.0) if self.steps_per_epoch else 0.5
        return min((self.epoch + inside) / self.epochs, 1.0)


class Hook:
    """Base of schedules, penalties, freezing and averages; override the methods that you need."""

    def on_start(self, loop: Loop) -> None:
        """Called once before the first step; after a resume `loop` has the state of the interrupted run."""

    def on_step(self, loop: Loop) -> None:
        """Called after each optimizer step, before the masks are applied."""

    def on_epoch(self, loop: Loop) -> None:
        """Called after each epoch, before its evaluation."""

    def penalty(self, loop: Loop) -> Tensor | None:
        """A scalar that is added to the loss."""
        return None

    def settled(self, loop: Loop) -> bool:
        """Whether the epoch that just ended may be the best one; False while a schedule is still running."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """Result of `fit`.

    Attributes:
        history: a row for each epoch: mean losses, validation metric, learning rate; with `patience` also the number
            of epochs since the best one.
        masks: masks at the end, by parameter name.
        best_epoch, best_value: of the epoch whose weights were kept; None without `evaluate`.
        layers: records of the layers that were distilled.
        stopped: why the training ended before its last epoch; empty where it did not.
    """

    history: Sequence[Mapping[str, float]]
    masks: Mapping[str, Tensor]
    best_epoch: int | None
    best_value: float | None
    layers: Sequence[LayerRecord] = ()
    stopped: str = ""


@dataclass(frozen=True, slots=True)
class LabelLoss:
    """The task's own loss."""

    task: Task

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        loss = self.task.compute_loss(self.task.forward(model, batch), batch)
        if loss is None:
            raise TrainError("a batch has no labels, but the loss needs them")
        return {"label": loss}


@checks_arguments(TrainError)
def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    epochs: int,
    settings: OptimizerSettings | None = None,
    evaluate: Task | None = None,
    patience: int | None = None,
    hooks: Sequence[Hook] = (),
    masks: Mapping[str, Tensor] | None = None,
    companion: nn.Module | None = None,
    state: Path | None = None,
    key: str = "",
    engine: Engine | None = None,
    seed: int = 0,
    progress: Callable[[Event], None] = log_progress,
    step_name: str = "fit",
    phase: str = "train",
) -> FitReport:
    """Train `model` in place; with `evaluate`, it ends with the weights of the best epoch by the metric on `val`.

    The random state and the modes of the model are restored. Processes that torchrun started train jointly and end with
    the same weights; with the strategy "fsdp" an error leaves the model without weights.

    Args:
        model: wrappers of `torch.compile` and `DataParallel` are taken off; they share the weights.
        objective: called with the model and a batch; returns named losses, which are added up.
        patience: end the training after so many epochs in a row without a better metric; needs `evaluate`. Epochs in
            which a schedule is still running do not count.
        masks: weights whose mask is False stay zero.
        companion: a module that trains along without being part of the model, such as projections of a loss.
        state: the checkpoint, written after every epoch; a run that resumes from it ends with the same weights as one
            that was never interrupted. Every epoch has its own seed.
        key: seals the checkpoint; one that is damaged or has another key is ignored with a warning.

    Raises:
        TaskError: there are no batches.
        TrainError: nothing can be trained, the devices cannot train this model, or a loss or weight is not finite.
        StorageError: the checkpoint cannot be written; the one before is kept.
    """
    check_epochs(epochs)
    check_patience(patience, evaluated=evaluate is not None)
    model = usable(model, TrainError)
    companion = None if companion is None else usable(companion, TrainError, "the companion")
    settings, engine = settings or OptimizerSettings(), engine or Engine()
    home = device_of(model)
    # a caller who only evaluates may have switched gradients off
    with preserved_globals(), torch.enable_grad(), fabric_for(engine) as fabric, modes_restored(model):
        with settings.freezing(model), placed(fabric, engine, model, companion or nn.Module(), settings) as place:
            count = length(batches, fabric.world_size)
            per_epoch = None if count is None else math.ceil(count / settings.accumulate)
            loop = Loop(model, place.optimizer, epochs, dict(masks or {}), per_epoch, whole=place.whole)
            average = None if settings.average is None else WeightAverage(model, settings.average)
            record = Record(place, state, key, average, patience)
            record.resume(loop)
            trainee = _Trainee(place, objective, settings, average, hooks, progress, step_name, phase)
            trainee.run(batches, loop, record, evaluate, seed)
        if record.best.weights is not None and record.best.masks is not None:
            place.load_weights(record.best.weights)
            loop.masks = record.best.masks
    return FitReport(
        history=record.history,
        masks={name: mask.to(home) for name, mask in loop.masks.items()},
        best_epoch=record.best.epoch,
        best_value=record.best.value,
        stopped=record.stopped(loop),
    )


@dataclass
class _Trainee:
    """The model under Fabric, with the settings of its training."""

    place: Placement
    objective: Objective
    settings: OptimizerSettings
    average: WeightAverage | None
    hooks: Sequence[Hook]
    progress: Callable[[Event], None]
    step_name: str
    phase: str
    last_finite: float = math.nan

    def run(self, batches: Iterable[Batch], loop: Loop, record: Record, evaluate: Task | None, seed: int) -> None:
        """Train from where `loop` stands to its last epoch."""
        keeper = MaskKeeper(dict(loop.model.named_parameters()), loop.optimizer, loop.masks)
        for hook in self.hooks:
            hook.on_start(loop)
        keeper.follow(loop.masks)
        metric = evaluate.as_metric() if evaluate else None
        self.hold(keeper)  # weights that arrive non-zero under a mask are zeroed before the first forward
        try:
            while loop.epoch < loop.epochs and not record.exhausted:
                epoch, epoch_seed = loop.epoch, seed * 100_003 + loop.epoch
                seed_everything(epoch_seed)
                with seeded(batches, epoch, epoch_seed):
                    row = self.epoch(shared(checked(batches, "train"), self.place.fabric), loop, keeper)
                share(loop.model.buffers())  # each process has seen other batches; all must keep the same best epoch
                if evaluate is not None and metric is not None:
                    with self.averaged():
                        with seeded(evaluate.val, epoch, epoch_seed):
                            row["val"] = evaluate.evaluate(predictor(loop.model), "val")
                        if all(hook.settled(loop) for hook in self.hooks):
                            record.rate(loop, row["val"], metric)
                    if record.patience is not None:
                        row["since_best"] = float(record.since_best)
                record.add(loop, row)
                if record.exhausted and loop.epoch < loop.epochs:
                    self.report(loop, loop.step, epoch=loop.epoch, last_epoch=loop.epoch)
            if self.average is not None:
                self.average.settle()
        finally:
            loop.model.zero_grad(set_to_none=True)

    def hold(self, keeper: MaskKeeper) -> None:
        """Zero the masked weights, in the average too."""
        keeper.after_step()
        if self.average is not None:
            keeper.zero(self.average.values)

    def averaged(self) -> AbstractContextManager[None]:
        """Return the context in which the model has its averaged weights, where they are asked for."""
        return nullcontext() if self.average is None else self.average.shown()

    def report(self, loop: Loop, total: int | None, **figures: float) -> None:
        """Report that `loop.step` of `total` steps are done; `last_epoch` tells that the training has stopped early."""
        values = {**figures, "loss": self.last_finite}
        self.progress(Event(step=self.step_name, phase=self.phase, current=loop.step, total=total, values=values))

    def epoch(self, batches: Iterator[Batch], loop: Loop, keeper: MaskKeeper) -> dict[str, float]:
        """One pass over the batches: a history row of mean losses."""
        base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in loop.optimizer.param_groups]
        sums: dict[str, float] = {}
        count = 0
        self.place.wrapped.train()
        self.place.companion.train()
        while batch_group := list(islice(batches, self.settings.accumulate)):
            factor = self.settings.factor(loop.midpoint)
            for group, lr in zip(loop.optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = lr * factor
            for name, value in self.step(batch_group, loop, keeper, count).items():
                sums[name] = sums.get(name, 0.0) + value
            count += len(batch_group)
            self.report(loop, loop.steps_per_epoch and loop.steps_per_epoch * loop.epochs, epoch=loop.epoch + 1)
        loop.steps_per_epoch = loop.steps_per_epoch or loop.step_in_epoch
        loop.epoch, loop.step_in_epoch = loop.epoch + 1, 0
        for hook in self.hooks:
            hook.on_epoch(loop)
        keeper.follow(loop.masks)
        self.hold(keeper)
        if broken := self.place.broken():
            raise self.diverged(f"{', '.join(broken[:3])} became nan or infinite", f"end of epoch {loop.epoch}")
        means = {f"loss_{name}": total / count for name, total in sums.items()}
        first = loop.optimizer.param_groups[0]
        return {"epoch": float(loop.epoch), **means, "lr": first["lr"] / first.get(LR_SCALE, 1.0)}

    def step(self, group: Sequence[Batch], loop: Loop, keeper: MaskKeeper, before: int) -> dict[str, float]:
        """One optimizer step, on the mean over a group of batches: the sums over them of the parts of the loss.

        `before` counts the epoch's batches before the group.
        """
        place, penalties = self.place, dict[str, Tensor]()
        sums: dict[str, float] = {}
        values: list[float] = []
        for number, batch in enumerate(group, 1):
            unfinished, where = number < len(group), f"epoch {loop.epoch + 1}, batch {before + number}"
            with place.accumulating(unfinished):
                with place.computing():
                    parts = self.losses(batch, where)
                penalties = self.penalties(loop) if number == 1 else penalties
                values.append(self.total({**parts, **penalties}).item())
                if not math.isfinite(values[-1]):
                    raise self.diverged(f"the loss became {values[-1]}", where)
                shares = [part / len(group) for part in parts.values()] if len(group) > 1 else [*parts.values()]
                if number == 1:
                    loop.optimizer.zero_grad(set_to_none=True)
                place.backward(shares, [*penalties.values()] if number == 1 else [], unfinished=unfinished)
            for name, part in {**parts, **penalties}.items():
                sums[name] = sums.get(name, 0.0) + part.item()
        self.last_finite = sum(values) / len(values)
        keeper.before_step()
        if self.settings.clip_norm is not None:
            norm = place.clip(self.settings.clip_norm)
            if norm is not None and not math.isfinite(norm):
                raise self.diverged(f"the gradient's norm became {norm}", where)
        place.stepper.step()
        loop.step += 1
        loop.step_in_epoch += 1
        for hook in self.hooks:
            hook.on_step(loop)
        keeper.follow(loop.masks)
        if self.average is not None:
            self.average.update(loop.step)
        self.hold(keeper)
        return sums

    def penalties(self, loop: Loop) -> dict[str, Tensor]:
        """The penalties of the hooks, by name."""
        values = (
            (f"penalty_{index}" if index else "penalty", hook.penalty(loop)) for index, hook in enumerate(self.hooks)
        )
        return {name: value for name, value in values if value is not None}

    def losses(self, batch: Batch, where: str) -> dict[str, Tensor]:
        """The objective's losses of a batch."""
        takes = "it is called with the model and a batch, and returns a dict of named losses"
        try:
            losses: Any = self.objective(self.place.wrapped, self.place.fabric.to_device(batch))
        except MISTAKES as cause:
            said = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
            raise TrainError(f"the objective failed in {self.step_name!r}, {where}: {said}; {takes}") from cause
        if not isinstance(losses, Mapping) or not all(isinstance(name, str) for name in losses):
            raise TrainError(f"the objective gave {shown(losses)}; {takes}")
        return dict(losses)

    def total(self, parts: Losses) -> Tensor:
        """The sum of all losses."""
        for name, part in parts.items():
            if not isinstance(part, Tensor) or part.numel() != 1:
                got = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                raise TrainError(f"the loss {name!r} must be one number in a tensor, got {got}; take its mean")
        if not any(part.requires_grad for part in parts.values()):
            raise TrainError(
                f"no loss depends on a trainable weight (losses: {', '.join(parts) or 'none'}); give a loss that is "
                "computed from the model's outputs without detach or no_grad"
            )
        return torch.stack([part.reshape(()) for part in parts.values()]).sum()

    def diverged(self, what: str, where: str) -> TrainError:
        """The error for values that are not finite."""
        before = "there was no finite loss before"
        if math.isfinite(self.last_finite):
            before = f"the last finite loss was {self.last_finite:.6g}"
        half = any(parameter.dtype == torch.float16 for parameter in self.place.model.parameters())
        mend = "train in float32 or bfloat16, as float16 parameters overflow; or " if half else ""
        return TrainError(
            f"{what} in {self.step_name!r}, {where}; {before}; {mend}lower lr (now {self.settings.lr:g}), set "
            "clip_norm, or look for bad values in that batch (the checkpoint of the last whole epoch is kept)"
        )


def check_epochs(epochs: int) -> None:
    """Raise TrainError unless it is a whole number of at least 1."""
    if not isinstance(epochs, int) or epochs < 1:
        raise TrainError(f"epochs must be a whole number of at least 1, got {epochs!r}")


def check_patience(patience: int | None, *, evaluated: bool) -> None:
    """Raise TrainError for a patience below 1, or without a metric that shows which epoch is better."""
    if patience is not None and patience < 1:
        raise TrainError(f"patience must be at least 1, got {patience}")
    if patience is not None and not evaluated:
        raise TrainError(
            f"patience={patience} compares epochs by the metric on val, which is not measured here; set keep='best' "
            "(in `fit`: evaluate=task), or leave patience out"
        )
