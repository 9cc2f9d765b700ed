"""The one training loop, on Lightning Fabric."""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchslim.errors import TrainError
from torchslim.files import write_bytes
from torchslim.isolation import preserved_globals, seed_everything
from torchslim.loaders import length, seeded, shared
from torchslim.optimizer import MaskKeeper, OptimizerSettings
from torchslim.processes import average_gradients, connect, launched, share
from torchslim.steps import Engine, Event, LayerRecord
from torchslim.task import Batch, Task, checked, device_of, predictor

Losses = Mapping[str, Tensor]
"""Named scalars; their sum is trained on, each is logged by itself."""


class Objective(Protocol):
    """What loss to train on."""

    def __call__(self, model: nn.Module, batch: Batch) -> Losses: ...


@dataclass
class Loop:
    """The state of a running `fit`, as hooks see it. Hooks may replace entries of `masks`."""

    model: nn.Module
    optimizer: Optimizer
    epochs: int
    masks: dict[str, Tensor] = field(default_factory=dict)
    steps_per_epoch: int | None = None  # for a loader without a length known after the first epoch
    epoch: int = 0  # finished epochs
    step: int = 0  # finished optimizer steps
    step_in_epoch: int = 0

    @property
    def progress(self) -> float:
        """Fraction of the training that is done, in [0, 1]; by whole epochs while an epoch's length is not known."""
        inside = min(self.step_in_epoch / self.steps_per_epoch, 1.0) if self.steps_per_epoch else 0.0
        return min((self.epoch + inside) / self.epochs, 1.0)

    @property
    def midpoint(self) -> float:
        """Progress in the middle of the coming step, or of the epoch: what the learning rate goes by.

        A step's start would give the first step no learning rate at all.
        """
        inside = min((self.step_in_epoch + 0.5) / self.steps_per_epoch, 1.0) if self.steps_per_epoch else 0.5
        return min((self.epoch + inside) / self.epochs, 1.0)


class Hook:
    """Override what is needed: schedules, penalties, freezing and averages are hooks of the one loop."""

    def on_start(self, loop: Loop) -> None:
        """Once before the first step; after a resume `loop` is where the killed run stood."""

    def on_step(self, loop: Loop) -> None:
        """After each optimizer step, before the masks are applied."""

    def on_epoch(self, loop: Loop) -> None:
        """After each epoch, before it is evaluated."""

    def penalty(self, loop: Loop) -> Tensor | None:
        """A scalar that is added to the loss."""
        return None

    def settled(self, loop: Loop) -> bool:
        """May the epoch that just ended be kept as the best? False while a schedule is still running."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """One row of `history` per epoch: the mean of each loss, the validation metric, the learning rate.

    `layers` says which layers were taught by what.
    """

    history: Sequence[Mapping[str, float]]
    masks: Mapping[str, Tensor]
    best_epoch: int | None
    best_value: float | None
    layers: Sequence[LayerRecord] = ()


@dataclass(frozen=True, slots=True)
class LabelLoss:
    """The task's loss, alone."""

    task: Task

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        loss = self.task.compute_loss(self.task.forward(model, batch), batch)
        if loss is None:
            raise TrainError("a batch has no labels, but the loss needs them")
        return {"label": loss}


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    epochs: int,
    settings: OptimizerSettings | None = None,
    evaluate: Task | None = None,
    hooks: Sequence[Hook] = (),
    masks: Mapping[str, Tensor] | None = None,
    companion: nn.Module | None = None,
    state: Path | None = None,
    engine: Engine | None = None,
    seed: int = 0,
    progress: Callable[[Event], None] = lambda event: None,
    step_name: str = "fit",
    phase: str = "train",
) -> FitReport:
    """Train `model` in place for `epochs`; with `evaluate`, end with the best epoch's weights by its val metric.

    Each epoch runs under its own seed, so a run that resumes from `state` (written after every epoch) ends with
    the same weights as an undisturbed one. Weights whose mask is False stay zero. The global random state is left
    as it was; the model returns to its device and its train/eval modes. What else learns, such as the projections of a
    loss, is the `companion`: in the optimizer and in the checkpoints, but no part of the model.

    Raises:
        TaskError: no batches.
        TrainError: nothing to train, or a loss or weights that are not finite (the last checkpoint is kept).
        StorageError: the checkpoint cannot be written (the one before is kept).
    """
    check_epochs(epochs)
    settings, engine = settings or OptimizerSettings(), engine or Engine()
    home = device_of(model)
    modes = {module: module.training for module in model.modules()}
    metric = evaluate.as_metric() if evaluate else None
    # a caller who only evaluates may have switched gradients off
    with preserved_globals(), torch.enable_grad(), _fabric(engine) as fabric:
        companion = (companion or nn.Module()).to(fabric.device)
        optimizer = settings.build(model, companion)
        wrapped, stepper = fabric.setup(model, optimizer)
        trainee = _Trainee(fabric, wrapped, companion, stepper, objective, settings, hooks, progress, step_name, phase)
        loop = Loop(model, optimizer, epochs, dict(masks or {}), length(batches, fabric.world_size))
        keeper = MaskKeeper(dict(model.named_parameters()), optimizer, loop.masks)
        history: list[dict[str, float]] = []
        best = _Best()
        if state is not None and state.exists():
            history, best = _restore(state, loop, companion)
        for hook in hooks:
            hook.on_start(loop)
        keeper.follow(loop.masks)
        keeper.after_step()  # weights that arrive non-zero under a mask are zeroed before the first forward
        try:
            for epoch in range(loop.epoch, epochs):
                epoch_seed = seed * 100_003 + epoch
                seed_everything(epoch_seed)
                with seeded(batches, epoch, epoch_seed):
                    row = trainee.epoch(shared(checked(batches, "train"), fabric), loop, keeper)
                share(model.buffers())  # each has seen batches of its own; all are to keep the same best epoch
                if evaluate is not None and metric is not None:
                    with seeded(evaluate.val, epoch, epoch_seed):
                        row["val"] = evaluate.evaluate(predictor(model), "val")
                    if all(hook.settled(loop) for hook in hooks) and metric.better(row["val"], best.value):
                        best = _Best(loop.epoch, row["val"], _weights(model), dict(loop.masks))
                history.append(row)
                if state is not None and fabric.is_global_zero:
                    _checkpoint(state, loop, companion, history, best)
        finally:
            model.to(home)
            for module, training in modes.items():
                module.training = training
            model.zero_grad(set_to_none=True)
        if best.weights is not None and best.masks is not None:
            model.load_state_dict(best.weights)
            loop.masks = best.masks
    held = {name: mask.to(home) for name, mask in loop.masks.items()}
    return FitReport(history=history, masks=held, best_epoch=best.epoch, best_value=best.value)


@dataclass(frozen=True, slots=True)
class _Best:
    epoch: int | None = None
    value: float | None = None
    weights: dict[str, Any] | None = None
    masks: dict[str, Tensor] | None = None


@dataclass
class _Trainee:
    """The model under Fabric, with all that one epoch needs."""

    fabric: Any
    model: nn.Module
    companion: nn.Module
    optimizer: Any
    objective: Objective
    settings: OptimizerSettings
    hooks: Sequence[Hook]
    progress: Callable[[Event], None]
    step_name: str
    phase: str
    last_finite: float = math.nan

    def epoch(self, batches: Iterator[Batch], loop: Loop, keeper: MaskKeeper) -> dict[str, float]:
        """One pass over the batches: a history row of mean losses."""
        base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in loop.optimizer.param_groups]
        sums: dict[str, float] = {}
        count = 0
        self.model.train()
        self.companion.train()
        for count, batch in enumerate(batches, 1):
            factor = self.settings.factor(loop.midpoint)
            for group, lr in zip(loop.optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = lr * factor
            for name, value in self.step(batch, loop, keeper, count).items():
                sums[name] = sums.get(name, 0.0) + value
            total = loop.steps_per_epoch and loop.steps_per_epoch * loop.epochs
            self.progress(
                Event(
                    step=self.step_name,
                    phase=self.phase,
                    current=loop.step,
                    total=total,
                    values={"epoch": loop.epoch + 1, "loss": self.last_finite},
                )
            )
        loop.epoch, loop.step_in_epoch = loop.epoch + 1, 0
        loop.steps_per_epoch = loop.steps_per_epoch or count
        for hook in self.hooks:
            hook.on_epoch(loop)
        keeper.follow(loop.masks)
        keeper.after_step()
        broken = [name for name, each in loop.model.named_parameters() if not torch.isfinite(each).all()]
        if broken:
            raise self.diverged(f"{', '.join(broken[:3])} became nan or infinite", f"end of epoch {loop.epoch}")
        means = {f"loss_{name}": total / count for name, total in sums.items()}
        return {"epoch": float(loop.epoch), **means, "lr": loop.optimizer.param_groups[0]["lr"]}

    def step(self, batch: Batch, loop: Loop, keeper: MaskKeeper, number: int) -> dict[str, float]:
        """One optimizer step: the value of each part of the loss."""
        parts = dict(self.objective(self.model, self.fabric.to_device(batch)))
        for index, hook in enumerate(self.hooks):
            penalty = hook.penalty(loop)
            if penalty is not None:
                parts[f"penalty_{index}" if index else "penalty"] = penalty
        loss = self.total(parts)
        where = f"epoch {loop.epoch + 1}, batch {number}"
        value = loss.item()
        if not math.isfinite(value):
            raise self.diverged(f"the loss became {value}", where)
        self.last_finite = value
        loop.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        average_gradients(self.companion)
        keeper.before_step()
        if self.settings.clip_norm is not None:
            norm = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.settings.clip_norm, error_if_nonfinite=False
            )
            if norm is not None and not math.isfinite(norm):
                raise self.diverged(f"the gradient's norm became {float(norm)}", where)
        self.optimizer.step()
        loop.step += 1
        loop.step_in_epoch = number
        for hook in self.hooks:
            hook.on_step(loop)
        keeper.follow(loop.masks)
        keeper.after_step()
        return {name: part.item() for name, part in parts.items()}

    def total(self, parts: Losses) -> Tensor:
        """The sum that is trained on."""
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
        """What to raise when numbers are lost."""
        before = "there was no finite loss before"
        if math.isfinite(self.last_finite):
            before = f"the last finite loss was {self.last_finite:.6g}"
        half = any(each.dtype == torch.float16 for each in self.model.parameters())
        mend = "train in float32 or bfloat16, as float16 parameters overflow; or " if half else ""
        return TrainError(
            f"{what} in {self.step_name!r}, {where}; {before}; {mend}lower lr (now {self.settings.lr:g}), set "
            "clip_norm, or look for bad values in that batch (the checkpoint of the last whole epoch is kept)"
        )


def check_epochs(epochs: int) -> None:
    """Raise TrainError unless it is a whole number of at least 1."""
    if not isinstance(epochs, int) or epochs < 1:
        raise TrainError(f"epochs must be a whole number of at least 1, got {epochs!r}")


def _weights(model: nn.Module) -> dict[str, Any]:
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }


def _checkpoint(state: Path, loop: Loop, companion: nn.Module, history: list[dict[str, float]], best: _Best) -> None:
    buffer = io.BytesIO()
    saved = {"epoch": loop.epoch, "step": loop.step, "model": _weights(loop.model), "masks": loop.masks,
             "companion": _weights(companion), "optimizer": loop.optimizer.state_dict(), "history": history,
             "steps_per_epoch": loop.steps_per_epoch,
             "best": [best.epoch, best.value, best.weights, best.masks]}  # fmt: skip
    torch.save(saved, buffer)
    write_bytes(state, buffer.getvalue())


def _restore(state: Path, loop: Loop, companion: nn.Module) -> tuple[list[dict[str, float]], _Best]:
    try:
        saved = torch.load(state, map_location=device_of(loop.model), weights_only=True)
        loop.model.load_state_dict(saved["model"])
        companion.load_state_dict(saved["companion"])
        loop.optimizer.load_state_dict(saved["optimizer"])
        loop.masks, loop.epoch, loop.step = saved["masks"], saved["epoch"], saved["step"]
        loop.steps_per_epoch = saved["steps_per_epoch"]
        return saved["history"], _Best(*saved["best"])
    except Exception as error:
        raise TrainError(f"the checkpoint {state} cannot be resumed from ({error}); delete it to start over") from error


def _precision(engine: Engine) -> Any:
    on_gpu = engine.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


@contextmanager
def _fabric(engine: Engine) -> Iterator[Any]:
    """Fabric for these devices, without its hints about devices that nobody asked for."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from lightning_fabric import Fabric

        precision: Any = engine.precision or _precision(engine)
        devices, nodes, strategy = engine.devices, 1, engine.strategy
        if launched() > 1:  # torchrun has said how many there are
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = launched() // devices
            strategy = "ddp" if strategy == "auto" else strategy
            connect()
        try:
            fabric = Fabric(
                accelerator=engine.accelerator,
                devices=devices,
                num_nodes=nodes,
                strategy=strategy,
                precision=precision,
            )
        except Exception as error:  # Fabric raises many kinds, all about what the engine asks for
            raise TrainError(f"{engine} cannot be used here: {error}") from error
        if fabric.world_size > 1:
            fabric.launch()
        yield fabric
    finally:
        logger.setLevel(level)
