"""Trials at less than full cost: run a recipe's steps without training, or with part of it, then measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from torchslim.artifact.assembled import AnyDeployed, pieces
from torchslim.artifact.latency_cache import LatencyTable
from torchslim.artifact.model_size import parameters, sample_macs
from torchslim.artifact.peak_memory import peak_memory
from torchslim.artifact.remote import TimingWorker
from torchslim.core import distributed
from torchslim.core.batches import take_first
from torchslim.core.budget import Budget
from torchslim.core.files import digest
from torchslim.core.isolation import copy_model, preserved_globals, trim
from torchslim.core.seals import key_id
from torchslim.core.step import Context, Event, Form, Inputs, Outcome, Step, Target, log_progress, step_name
from torchslim.core.task import Task
from torchslim.distill import Distill
from torchslim.errors import TorchslimError
from torchslim.pipeline.beginning import begun, origin
from torchslim.pipeline.recipe import Recipe
from torchslim.pipeline.stages import alone, keep, kept, stage_key, taken_again
from torchslim.pipeline.target_bench import Bench
from torchslim.prune import Prune
from torchslim.quantize import Quantize
from torchslim.training.finetune import Training
from torchslim.training.loaders import part_of, seeded_splits

Figures = Mapping[str, float]
"""By the names of `budget.UNITS`, and "metric", the value itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of a recipe's cost a trial spends.

    Args:
        training: share of every training's epochs; 0 leaves training steps out, and makes others only prune and round.
        data: share of the validation batches.
    """

    name: Literal["cheap", "short"]
    training: float
    data: float


def cut_short(step: Any, effort: Effort) -> Any:
    """The step at less cost; None if it is left out."""
    if isinstance(step, Training):
        if effort.training:
            return _shorter(step, effort)
        return Untrained(step) if isinstance(step, Distill) and step.student is not None else None
    if effort.training:
        return _shorter(step, effort)
    if isinstance(step, Prune):
        return replace(step, train=None, schedule="one-shot", sparsify=None, strength=None, sparsify_train=None)
    if isinstance(step, Quantize):
        layers = {} if step.layers == "auto" else step.layers
        return replace(
            step,
            layers=layers,
            mode="ptq",
            train=None,
            learned_step=False,
            accuracy="plain",
            rounding=None,
            correct_biases=None,
            by="metric",
            metric_drop=None,
        )
    return step


def _shorter(step: Any, effort: Effort) -> Any:
    if isinstance(step, Training):
        return replace(step, epochs=max(1, int(step.epochs * effort.training)))
    if not is_dataclass(step) or isinstance(step, type):
        return step
    if isinstance(step, Quantize) and step.by == "latency":  # programs are timed for whole recipes alone
        step = replace(step, layers={} if step.metric_drop is None else "auto", by="metric")
    if isinstance(step, Quantize) and step.mode == "qat" and step.train is None:
        return replace(step, train=_shorter(step.training(), effort))
    inner = {
        name: _shorter(training, effort) for name, training in vars(step).items() if isinstance(training, Training)
    }
    return replace(step, **inner) if inner else step


@dataclass(frozen=True)
class Untrained:
    """Step that replaces a distillation into a new student: returns the student without training it."""

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.MODULE

    step: Distill

    def check(self, ctx: Context) -> None:
        """Accept every context."""

    def initial_model(self, model: nn.Module, seed: int) -> nn.Module:
        """The student, as the distillation creates it."""
        return self.step.initial_model(model, seed)

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        return Outcome(model=self.initial_model(model, ctx.seed))


@dataclass
class Lab:
    """Runs trials; steps that several trials share run once, and their results are kept in `folder`."""

    model: nn.Module
    task: Task
    teacher: nn.Module | None
    budget: Budget
    folder: Path
    example_inputs: Inputs
    seed: int
    examples: Sequence[Inputs] = ()
    dynamic_shapes: Any = "auto"
    parts: Mapping[str, Sequence[Inputs]] = field(default_factory=dict)
    worker: TimingWorker | None = None
    short: float = 0.25
    progress: Callable[[Event], None] = log_progress
    _origins: dict[str, str] = field(default_factory=dict)
    _baselines: dict[Target, tuple[AnyDeployed, dict[str, float]]] = field(default_factory=dict)
    _metrics: dict[tuple[Target, float], float] = field(default_factory=dict)  # of the original, by share of val
    _memories: dict[str, float] = field(default_factory=dict)

    def efforts(self) -> tuple[Effort, Effort]:
        """The two efforts before a full training."""
        return Effort(name="cheap", training=0.0, data=0.25), Effort(name="short", training=self.short, data=1.0)

    def attempt(self, recipe: Recipe, effort: Effort) -> dict[str, float]:
        """Figures of a recipe at an effort.

        Raises:
            TorchslimError: a step of the recipe cannot run.
        """
        ctx = self._context(recipe)
        with preserved_globals(self.seed):
            model = self._taken(recipe, ctx, effort)
            return self._figures(model, recipe.target, effort)

    def made(self, recipe: Recipe, effort: Effort) -> nn.Module:
        """The model that a recipe makes at an effort, not deployed.

        Raises:
            TorchslimError: a step of the recipe cannot run.
        """
        with preserved_globals(self.seed):
            return self._taken(recipe, self._context(recipe), effort)

    def baseline(self, target: Target, effort: Effort | None = None) -> dict[str, float]:
        """Figures of the original model on a runtime."""
        if target not in self._baselines:
            model, _ = copy_model(self.model)
            bench = self._bench(target, ())
            with preserved_globals(self.seed):
                deployed = bench.deploy(model)
            if "latency" in self.budget.figures:
                bench.latency_table().settle(deployed)
            self._baselines[target] = deployed, {}
            with preserved_globals(self.seed):
                self._baselines[target][1].update(self._sizes(deployed, self.model, target))
        deployed, sizes = self._baselines[target]
        share = effort.data if effort is not None else 1.0
        if (target, share) not in self._metrics:
            self._metrics[target, share] = self._metric(deployed, share)
        return {**sizes, "metric": self._metrics[target, share], "metric_drop": 0.0}

    def _bench(self, target: Target, steps: Sequence[Step]) -> Bench:
        return Bench(
            task=self.task,
            example_inputs=self.example_inputs,
            target=target,
            steps=steps,
            examples=self.examples,
            dynamic_shapes=self.dynamic_shapes,
            parts=self.parts,
            worker=self.worker,
        )

    def _context(self, recipe: Recipe) -> Context:
        copied, masks = copy_model(self.model)
        teacher = copied if self.teacher is None else self.teacher
        return Context(
            task=self.task,
            model=copied,
            teacher=copy_model(teacher)[0].eval(),
            example_inputs=self.example_inputs,
            masks=masks,
            target=recipe.target,
            engine=recipe.engine,
            seed=self.seed,
            progress=self.progress,
            examples=self.examples,
            dynamic_shapes=self.dynamic_shapes,
            parts=self.parts,
            priors={} if (sensitivity := recipe.known_sensitivity()) is None else sensitivity.priors(),
        )

    def _taken(self, recipe: Recipe, ctx: Context, effort: Effort) -> nn.Module:
        """The model after the steps; the results of steps that an earlier trial ran are read from its folder."""
        assert ctx.model is not None
        model, masks = ctx.model, ctx.masks
        origin_key = f"{recipe.engine} {recipe.sensitivity}"
        if origin_key not in self._origins:
            self._origins[origin_key] = origin(ctx, model, take_first(self.task.val, "val"))
        key = self._origins[origin_key]
        ctx = replace(ctx, workbench=self._bench(recipe.target, recipe.steps))
        for index, full_step in enumerate(recipe.steps, 1):
            step = cut_short(full_step, effort)
            if step is None:
                continue
            share = data_share(full_step, effort) if shortenable(step) else 1.0
            target_fields = asdict(recipe.target) if _looks_at_target(step) else None
            key = digest(stage_key(key, step, recipe.steps, self.seed), share, target_fields)
            step_ctx = replace(
                ctx,
                task=replace(self.task, train=part_of(self.task.train, share)),
                masks=masks,
                name=step_name(step),
                model=model,
                seed=self.seed + 1_000 * index,
            )
            if step.produces is Form.MODULE:
                model, masks = self._known(step, model, step_ctx, key)
            else:
                outcome = _outcome(step, model, step_ctx)
                model, masks = outcome.model, outcome.masks
        trim()
        return model

    def _known(self, step: Step, model: nn.Module, ctx: Context, key: str) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Model and masks after a step: read from its folder if an earlier trial ran it, else computed and kept."""
        folder = self.folder / key_id(key)[:24]
        with alone(folder, self.progress):
            stored = _restored(folder, key, begun(step, model, self.seed) or model)
            if distributed.agreed(stored is not None) and stored is not None:
                return stored
            outcome = _outcome(step, model, ctx)
            if distributed.is_first():
                keep(folder, key, module=outcome.model, masks=outcome.masks)
            distributed.wait()
            return outcome.model, outcome.masks

    def _figures(self, model: nn.Module, target: Target, effort: Effort) -> dict[str, float]:
        """Figures of a model on the target; the first process measures them and sends them to the others."""
        figures: dict[str, float] = {}
        if distributed.is_first():
            base = self.baseline(target, effort)
            deployed = self._bench(target, ()).deploy(model)
            value = self._metric(deployed, effort.data)
            higher = self.task.as_metric().higher_is_better
            figures = self._sizes(deployed, deployed.made_from or model, target)
            figures |= {"metric": value, "metric_drop": base["metric"] - value if higher else value - base["metric"]}
        shared: dict[str, float] = distributed.told(figures)
        return shared

    def _metric(self, deployed: AnyDeployed, share: float) -> float:
        task = replace(self.task, val=part_of(self.task.val, share))
        with preserved_globals(self.seed), seeded_splits(task, self.seed):
            return task.evaluate(deployed, "val")

    def _sizes(self, deployed: AnyDeployed, model: nn.Module, target: Target) -> dict[str, float]:
        """All figures that the budget asks for, except the metric's."""
        figures: dict[str, float] = {}
        if "latency" in self.budget.figures:
            reference = self._baselines[target][0]
            table = LatencyTable(target.runtime, target.threads, worker=self.worker)
            timing = table.measure({"it": deployed}, reference)["it"]
            baseline = table.known(reference.structure)[reference.structure]
            figures["latency"] = timing.ratio.value * baseline.latency.value
        if "size" in self.budget.figures:
            if deployed.size_bytes is None:
                raise TorchslimError(
                    f"runtime {target.runtime!r} has no file whose size could be bounded; leave it out"
                )
            figures["size"] = deployed.size_bytes / 1e6
        if "macs" in self.budget.figures:
            figures["macs"] = float(sample_macs(model, deployed).total)
        if "params" in self.budget.figures:
            figures["params"] = float(parameters(model))
        if "peak_memory" in self.budget.figures:
            structure = deployed.structure
            if structure not in self._memories:
                self._memories[structure] = sum(map(peak_memory, pieces(deployed).values())) / 1e6
            figures["peak_memory"] = self._memories[structure]
        return figures


def shortenable(step: Step) -> list[Training]:
    """Trainings of a step that an `Effort` can shorten: the step itself, or those among its fields.

    `Trains.trainings` answers another question, how many epochs will run: it counts a training once for every round of
    a schedule, and a user's step may train in a way that no effort shortens, or lack the method.
    """
    if isinstance(step, Training):
        return [step]
    if isinstance(step, Quantize):
        return [step.training()] if step.mode == "qat" else []
    return [value for value in vars(step).values() if isinstance(value, Training)] if hasattr(step, "__dict__") else []


def data_share(step: Step, effort: Effort) -> float:
    """Share of the training batches in the remaining epochs: for less than one epoch, a part of the data."""
    epochs = [training.epochs * effort.training for training in shortenable(step)]
    return min((min(1.0, count / max(1, int(count))) for count in epochs if count), default=1.0)


def _looks_at_target(step: Any) -> bool:
    return not isinstance(step, Training) and not (isinstance(step, Prune) and step.of != "latency")


def _outcome(step: Step, model: nn.Module, ctx: Context) -> Outcome:
    step.check(ctx)
    with preserved_globals(ctx.seed), seeded_splits(ctx.task, ctx.seed):
        return step(copy_model(model)[0], ctx)


def _restored(folder: Path, key: str, model: nn.Module) -> tuple[nn.Module, Mapping[str, Tensor]] | None:
    stage = kept(folder, key)
    if stage is None:
        return None
    try:
        return stage.opened.into(copy_model(model)[0]), stage.opened.masks()
    except TorchslimError as error:
        taken_again(error)
        return None
