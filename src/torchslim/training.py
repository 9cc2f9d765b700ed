"""The one training loop, on Lightning Fabric, and the steps that are nothing but training."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from torchslim.errors import TrainError
from torchslim.files import write_bytes
from torchslim.isolation import preserved_globals, seed_everything
from torchslim.steps import Context, Engine, Event, Form, LayerRecord, Outcome, resolve
from torchslim.task import Batch, Metric, Predict, Task, checked, device_of, predictor, take_first

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
    steps_per_epoch: int | None = None
    epoch: int = 0  # finished epochs
    step: int = 0  # finished optimizer steps
    step_in_epoch: int = 0

    @property
    def progress(self) -> float:
        """Fraction of the training that is done, in [0, 1]; by epochs where the loader has no length."""
        inside = min(self.step_in_epoch / self.steps_per_epoch, 1.0) if self.steps_per_epoch else 0.0
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
    """One row of `history` per epoch: the mean of each loss, the validation metric, the learning rate."""

    history: Sequence[Mapping[str, float]]
    masks: Mapping[str, Tensor]
    best_epoch: int | None
    best_value: float | None


@dataclass(frozen=True, kw_only=True)
class Training:
    """The fields that every training step shares; the optimizer's are those of `OptimizerSettings`."""

    epochs: int = 3
    optimizer: Literal["sgd", "adamw"] | str | Callable[[Iterable[Any]], Optimizer] = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    clip_norm: float | None = None
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("lr", self.lr > 0 and math.isfinite(self.lr), "a finite number above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0"),
        ):
            if not valid:
                raise TrainError(f"{name} must be {rule}, got {getattr(self, name)}")

    def objective(self, ctx: Context) -> Objective:
        """The loss to train on."""
        raise NotImplementedError

    def check_training(self, ctx: Context) -> None:
        """Raise for what training would fail on: no data, no optimizer."""
        take_first(ctx.task.train, "train")
        if isinstance(self.optimizer, str) and self.optimizer not in ("sgd", "adamw"):
            resolve(self.optimizer, "optimizer", TrainError)

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
        settings = {name: getattr(self, name) for name in OptimizerSettings.__dataclass_fields__}
        return fit(
            model,
            self.objective(ctx),
            ctx.task.train if ctx.task.train is not None else (),
            epochs=self.epochs,
            settings=OptimizerSettings(**settings),
            evaluate=ctx.task if self.keep == "best" else None,
            hooks=hooks,
            masks=ctx.masks if masks is None else masks,
            state=ctx.state / f"{phase}-{part}.ckpt" if ctx.state else None,
            engine=ctx.engine,
            seed=ctx.seed + part,
            progress=lambda event: ctx.progress(event),
            step_name=ctx.name,
            phase=phase,
        )


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Train on the labels with the task's own loss."""

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.MODULE

    def objective(self, ctx: Context) -> Objective:
        """The task's loss."""
        return LabelLoss(ctx.task)

    def check(self, ctx: Context) -> None:
        """Needs training batches with labels."""
        self.check_training(ctx)
        if ctx.task.loss is None and ctx.task.target(take_first(ctx.task.train, "train")) is None:
            raise TrainError(
                "Finetune needs labels, but Task.target gives None; use Distill with alpha=1, or give Task(loss=...)"
            )

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        return trained(model, ctx, self.fit(model, ctx))


def trained(model: nn.Module, ctx: Context, report: FitReport) -> Outcome:
    """The outcome of a step that only trains."""
    record = LayerRecord(layer="", action="trained", reason=f"best epoch {report.best_epoch}")
    return Outcome(model=model, masks=ctx.masks, layers=[record], history=report.history)


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
    as it was; the model returns to its device and its train/eval modes.

    Raises:
        TrainError: no batches, nothing to train, or a loss that is not finite (the last checkpoint is kept).
    """
    settings, engine = settings or OptimizerSettings(), engine or Engine()
    home = device_of(model)
    modes = {module: module.training for module in model.modules()}
    metric = evaluate.as_metric() if evaluate else None
    with preserved_globals(), _fabric(engine) as fabric:
        optimizer = settings.build(model)
        trainee = _Trainee(fabric, *fabric.setup(model, optimizer), objective, settings, hooks, progress, step_name, phase)
        loop = Loop(model, optimizer, epochs, dict(masks or {}), _length(batches, fabric.world_size))
        keeper = MaskKeeper(dict(model.named_parameters()), optimizer, loop.masks)
        history: list[dict[str, float]] = []
        best = _Best()
        if state is not None and state.exists():
            history, best = _restore(state, loop)
        for hook in hooks:
            hook.on_start(loop)
        keeper.follow(loop.masks)
        keeper.after_step()  # weights that arrive non-zero under a mask are zeroed before the first forward
        try:
            for epoch in range(loop.epoch, epochs):
                epoch_seed = seed * 100_003 + epoch
                seed_everything(epoch_seed)
                with _seeded_loader(batches, epoch, epoch_seed):
                    row = trainee.epoch(_share(checked(batches, "train"), fabric), loop, keeper)
                if evaluate is not None and metric is not None:
                    row["val"] = evaluate.evaluate(predictor(model), "val")
                    if all(hook.settled(loop) for hook in hooks) and metric.better(row["val"], best.value):
                        best = _Best(loop.epoch, row["val"], _weights(model), dict(loop.masks))
                history.append(row)
                if state is not None and fabric.is_global_zero:
                    _checkpoint(state, loop, history, best)
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
        for count, batch in enumerate(batches, 1):
            factor = self.settings.factor(loop.progress)
            for group, lr in zip(loop.optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = lr * factor
            for name, value in self.step(batch, loop, keeper, count).items():
                sums[name] = sums.get(name, 0.0) + value
            total = loop.steps_per_epoch and loop.steps_per_epoch * loop.epochs
            self.progress(
                Event(step=self.step_name, phase=self.phase, current=loop.step, total=total,
                      values={"epoch": loop.epoch + 1, "loss": self.last_finite})
            )
        loop.epoch, loop.step_in_epoch = loop.epoch + 1, 0
        for hook in self.hooks:
            hook.on_epoch(loop)
        keeper.follow(loop.masks)
        keeper.after_step()
        means = {f"loss_{name}": total / count for name, total in sums.items()}
        return {"epoch": float(loop.epoch), **means, "lr": loop.optimizer.param_groups[0]["lr"]}

    def step(self, batch: Batch, loop: Loop, keeper: MaskKeeper, number: int) -> dict[str, float]:
        """One optimizer step: the value of each part of the loss."""
        parts = dict(self.objective(self.model, self.fabric.to_device(batch)))
        for index, hook in enumerate(self.hooks):
            penalty = hook.penalty(loop)
            if penalty is not None:
                parts[f"penalty_{index}" if index else "penalty"] = penalty
        loss = torch.stack([part.reshape(()) for part in parts.values()]).sum()
        value = loss.item()
        if not math.isfinite(value):
            raise TrainError(
                f"the loss became {value} in {self.step_name!r}, epoch {loop.epoch + 1}, batch {number}; the last "
                f"finite loss was {self.last_finite:.6g}; lower lr (now {self.settings.lr:g}), set clip_norm, or look "
                "for bad values in that batch (the checkpoint of the last whole epoch is kept)"
            )
        self.last_finite = value
        loop.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        keeper.before_step()
        if self.settings.clip_norm is not None:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.settings.clip_norm)
        self.optimizer.step()
        loop.step += 1
        loop.step_in_epoch = number
        for hook in self.hooks:
            hook.on_step(loop)
        keeper.follow(loop.masks)
        keeper.after_step()
        return {name: part.item() for name, part in parts.items()}


def _weights(model: nn.Module) -> dict[str, Any]:
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }


def _checkpoint(state: Path, loop: Loop, history: list[dict[str, float]], best: _Best) -> None:
    buffer = io.BytesIO()
    saved = {"epoch": loop.epoch, "step": loop.step, "model": _weights(loop.model), "masks": loop.masks,
             "optimizer": loop.optimizer.state_dict(), "history": history,
             "best": [best.epoch, best.value, best.weights, best.masks]}  # fmt: skip
    torch.save(saved, buffer)
    write_bytes(state, buffer.getvalue())


def _restore(state: Path, loop: Loop) -> tuple[list[dict[str, float]], _Best]:
    try:
        saved = torch.load(state, map_location=device_of(loop.model), weights_only=True)
        loop.model.load_state_dict(saved["model"])
        loop.optimizer.load_state_dict(saved["optimizer"])
        loop.masks, loop.epoch, loop.step = saved["masks"], saved["epoch"], saved["step"]
        return saved["history"], _Best(*saved["best"])
    except Exception as error:  # noqa: BLE001 - a damaged file fails in many ways, all mended alike
        raise TrainError(f"the checkpoint {state} cannot be resumed from ({error}); delete it to start over") from error


def _precision(engine: Engine) -> Any:
    on_gpu = engine.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def _length(batches: Iterable[Batch], world_size: int) -> int | None:
    with suppress(TypeError):  # an iterable dataset has no length: progress then goes by epochs
        return max(len(batches) // world_size, 1)  # type: ignore[arg-type]
    return None


def _share(batches: Iterator[Batch], fabric: Any) -> Iterator[Batch]:
    """Every process sees its own batches of the one seeded order."""
    return batches if fabric.world_size == 1 else islice(batches, fabric.global_rank, None, fabric.world_size)


@contextmanager
def _seeded_loader(batches: Iterable[Batch], epoch: int, seed: int) -> Iterator[None]:
    """Seed the loader's own generators for this epoch, and give them back as they were."""
    sampler = getattr(batches, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    owned = (getattr(batches, "generator", None), getattr(sampler, "generator", None))
    generators = {id(each): each for each in owned if isinstance(each, torch.Generator)}
    states = {key: each.get_state() for key, each in generators.items()}
    try:
        for each in generators.values():
            each.manual_seed(seed)
        yield
    finally:
        for key, each in generators.items():
            each.set_state(states[key])


@contextmanager
def _fabric(engine: Engine) -> Iterator[Any]:
    """Fabric for these devices, without its hints about devices that nobody asked for."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from lightning_fabric import Fabric

        precision: Any = engine.precision or _precision(engine)
        fabric = Fabric(
            accelerator=engine.accelerator, devices=engine.devices, strategy=engine.strategy, precision=precision
        )
        if fabric.world_size > 1:
            fabric.launch()
        yield fabric
    finally:
        logger.setLevel(level)
