"""A run: copies the model, measures it, takes and measures each step, stores the evidence, resumes after a kill."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchslim._version import __version__
from torchslim.artifact.assembled import AnyDeployed, DeployedParts
from torchslim.artifact.deployment import merged
from torchslim.artifact.integer_coverage import executed, lowered
from torchslim.artifact.latency import shared_examples
from torchslim.artifact.model_size import nonzeros, parameters, sample_macs
from torchslim.artifact.shipped import kept_right
from torchslim.core import distributed
from torchslim.core.batches import call, predictor
from torchslim.core.files import digest, remove, write_json
from torchslim.core.hardware import describe_machine
from torchslim.core.infinities import spoiled
from torchslim.core.isolation import copy_model, preserved_globals
from torchslim.core.metrics import Metric
from torchslim.core.parts import part_at, part_views, unmounted
from torchslim.core.seals import key_id
from torchslim.core.step import Context, Event, Form, Outcome, Step, step_name
from torchslim.core.task import Task
from torchslim.core.trees import tensors, to_device
from torchslim.errors import RecipeError, TorchslimError
from torchslim.graph.capturable import parts_named
from torchslim.graph.io_structure import describe
from torchslim.pipeline.beginning import begun, check_before, ready
from torchslim.pipeline.forecast import Progress
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.rehearsal import Rehearsed, rehearse, rehearsed_once, run_key
from torchslim.pipeline.result import Result
from torchslim.pipeline.run_record import compare_rows, not_measured, number, shapes_of, size
from torchslim.pipeline.stage_timing import ROUNDS, timed
from torchslim.pipeline.stages import Stage, alone, restored, stage_key, state_folder
from torchslim.pipeline.target_bench import Bench
from torchslim.pipeline.work_folder import SHARED_SECONDS, working_in
from torchslim.quantize.modules import is_quantized
from torchslim.report import RUN_FORMAT
from torchslim.training.calibration import CalibrationData
from torchslim.training.loaders import seeded_splits

MACS_OF_PARTS = "MACs, one call of each part"


def run_steps(model: nn.Module, task: Task, steps: Sequence[Step], options: RunOptions) -> Result:
    """Apply the steps to a copy of the model; measure the model after each step, and the artifact that ships.

    Raises:
        TorchslimError: a subclass; the message says what is wrong, which value was passed, and how to fix it.
    """
    steps = list(steps)
    check_before(model, steps, options)
    temporary = None if options.workdir else tempfile.TemporaryDirectory(prefix="torchslim-")
    folder = Path(options.workdir or temporary.name)  # type: ignore[union-attr]
    recipe = options.recipe(steps)
    distributed.connect()
    if distributed.count() > 1 and options.workdir is None:
        raise RecipeError("several processes train one model: give a workdir that all of them can access")
    shared = Path(options.stages) if options.stages else None
    waiting = options.progress if shared else None
    with (
        ready(model, task, steps, options) as (ctx, bench, key),
        working_in(folder, recipe, options.overwrite, waiting),
    ):
        rehearsed = Rehearsed()
        if options.rehearse:
            whole_key = run_key(key, options.target, steps, options.seed)
            rehearsed = rehearsed_once(ctx, steps, _maker(bench, key), folder, whole_key)
        progress = Progress(ctx.progress, steps, rehearsed.forecast)
        ctx = replace(ctx, progress=progress)
        runner = _Runner(ctx, bench, folder, key, steps, shared)
        runner.known = rehearsed.baseline
        assert ctx.model is not None
        stages = [runner.baseline(ctx.model, ctx.masks)]
        for index, step in enumerate(steps, 1):
            stages.append(runner.take(index, step, stages[-1]))
        run: dict[str, Any] = {}
        if distributed.is_first():
            report = runner.report(stages, recipe)
            run = json.loads(json.dumps(report | progress.report(), allow_nan=False))
            write_json(folder / "run.json", run)
        run = distributed.told(run)
    last = stages[-1]
    return Result(
        model=last.model,
        module=last.module,
        masks=last.masks,
        deployed=last.deployed,
        run=run,
        folder=folder,
        _keep=temporary,
    )


def rehearse_steps(
    model: nn.Module,
    task: Task,
    steps: Sequence[Step],
    options: RunOptions,
    folder: Path | None = None,
) -> Rehearsed:
    """Rehearse a run without running it: `run_steps` rehearses by itself.

    Args:
        model, task, steps, options: as for `run_steps`; of the options, the folders are not used.
        folder: a folder that keeps the record, which several processes may share; a rehearsal that passed there
            before is not repeated.

    Raises:
        TorchslimError: as `run_steps` would; names the step and the line of the user's code.
    """
    steps = list(steps)
    check_before(model, steps, options)
    distributed.connect()
    with ready(model, task, steps, options) as (ctx, bench, key):
        if folder is not None:
            whole_key = run_key(key, options.target, steps, options.seed)
            return rehearsed_once(ctx, steps, _maker(bench, key), folder, whole_key, older_s=SHARED_SECONDS)
        with tempfile.TemporaryDirectory(prefix="torchslim-") as temporary:
            return rehearse(ctx, steps, _maker(bench, key), Path(distributed.told(temporary)) / "rehearsal")


def _maker(bench: Bench, key: str) -> Callable[[Context, Sequence[Step], Path], _Runner]:
    """Return a function that begins a run for a rehearsal, on the bench of the run, but with few timed calls."""

    def make(ctx: Context, steps: Sequence[Step], folder: Path) -> _Runner:
        few = replace(bench, task=ctx.task, steps=steps)
        runner = _Runner(replace(ctx, workbench=few), few, folder, digest(key, "rehearsal"), steps, None)
        runner.rounds = 1
        return runner

    return make


def _by_the_first(make: Callable[[], Stage], read: Callable[[], Stage | None]) -> Stage:
    """Make and store a stage in the first process; the other processes wait, and read it from its folder."""
    stage = make() if distributed.is_first() else None
    distributed.wait()
    stage = stage or read()
    assert stage is not None, "the first process has kept the stage"
    return stage


class _Runner:
    """Takes steps, stores finished stages in folders, and restores those that an interrupted run has finished."""

    def __init__(
        self, ctx: Context, bench: Bench, folder: Path, origin: str, steps: Sequence[Step], shared: Path | None
    ) -> None:
        self.ctx, self.bench, self.folder, self.steps, self.shared = ctx, bench, folder, steps, shared
        self.key = origin
        self.metric: Metric = ctx.task.as_metric()
        self.machine = describe_machine(ctx.target.threads)
        self.examples = ctx.example_inputs, ctx.parts
        self.classes: dict[str, type] = {}  # classes of the model's outputs: files store only their names
        self.rounds = ROUNDS
        self.known: AnyDeployed | None = None  # the model before any step, as a rehearsal has deployed it

    def _place(self, name: str) -> Path:
        """Return a stage's folder: by its name in this run's folder, or by its key in a folder that runs share."""
        return self.folder / name if self.shared is None else self.shared / key_id(self.key)[:24]

    def baseline(self, model: nn.Module, masks: Mapping[str, Tensor]) -> Stage:
        """Measure the unmodified model, or restore its stage."""
        self.key = digest(self.key, asdict(self.ctx.target))
        for path, part in part_views(model, self.ctx.parts).items():
            describe(call(predictor(part), self.ctx.within(path).example_inputs), [], self.classes)
        folder, runtime = self._place("00-baseline"), self.ctx.target.runtime

        def kept() -> Stage | None:
            return restored(folder, self.key, Form.MODULE, model, model, self.classes, runtime, self.ctx.example_inputs)

        hint = nullcontext() if self.ctx.parts else parts_named(model, self.ctx.example_inputs)
        with alone(folder, self.ctx.progress if self.shared else None), hint:
            return _by_the_first(
                lambda: kept() or self._finish("baseline", folder, Outcome(model=model, masks=masks), model, 0.0, 0),
                kept,
            )

    def take(self, index: int, step: Step, before: Stage) -> Stage:
        """Apply one step to a copy of the previous stage's model, or restore the step's stage."""
        name = step_name(step)
        self.key = stage_key(self.key, step, self.steps, self.ctx.seed)
        folder = self._place(f"{index:02d}-{name}")
        with alone(folder, self.ctx.progress if self.shared else None):
            stage = self._restored(folder, step, before)
            if distributed.agreed(stage is not None) and stage is not None:
                if distributed.is_first():
                    remove(folder.with_name(f"{folder.name}.state"))  # of a run that was killed just after the step
                self.ctx.progress(Event(step=name, phase="resumed"))
                return stage
            return self._taken(index, step, before, folder)

    def _taken(self, index: int, step: Step, before: Stage, folder: Path) -> Stage:
        name = step_name(step)
        with state_folder(folder, self.key) as state:
            seed = self.ctx.seed + 1_000 * index
            ctx = replace(
                self.ctx,
                masks=before.masks,
                name=name,
                seed=seed,
                state=state,
                key=self.key,
                calibration=CalibrationData(self.ctx.task, seed),
            )
            self.ctx.progress(Event(step=name, phase="start"))
            start = time.perf_counter()
            with preserved_globals(ctx.seed), seeded_splits(ctx.task, ctx.seed):
                outcome = step(copy_model(before.model)[0], ctx)
            if not isinstance(outcome, Outcome) or not isinstance(outcome.model, nn.Module):
                raise RecipeError(
                    f"step {index} ({name!r}) must return an Outcome with a model, got {type(outcome).__name__}"
                )
            self._verify(outcome, step, before.model)
            return _by_the_first(
                lambda: self._finish(name, folder, outcome, before.module, time.perf_counter() - start, index),
                lambda: self._restored(folder, step, before),
            )

    def _restored(self, folder: Path, step: Step, before: Stage) -> Stage | None:
        module = begun(step, before.module, self.ctx.seed)
        return restored(
            folder,
            self.key,
            step.produces,
            module or before.module,
            before.model,
            self.classes,
            self.ctx.target.runtime,
            *self.examples,
        )

    def _verify(self, outcome: Outcome, step: Step, before: nn.Module) -> None:
        """Raise for a model that fails, or whose outputs are infinite or NaN where they were finite before the step."""
        if any(getattr(part_at(outcome.model, path), "evidence", None) is not None for path in self.ctx.paths):
            return  # quantization has compared the model with float
        inputs = to_device(self.ctx.example_inputs, "cpu")
        outputs = tensors(call(predictor(outcome.model), inputs))
        if all(bool(torch.isfinite(output).all()) for output in outputs if output.is_floating_point()):
            return
        initial = begun(step, before, self.ctx.seed)  # masked logits may be -inf before the step, too
        count = spoiled(tensors(call(predictor(initial or before), inputs)), outputs)
        if count:
            raise TorchslimError(
                f"after step {step_name(step)!r} {count} values of the model's outputs on the example inputs are not "
                "finite, where they were before"
            )

    def _finish(
        self, name: str, folder: Path, outcome: Outcome, module: nn.Module, seconds: float, index: int
    ) -> Stage:
        """Deploy, measure and store a stage; redo with layers in float if the stored artifact gives other outputs."""
        self.ctx.progress(Event(step=name, phase="deploy"))
        known = None if index else self.known
        stage = self._kept(name, folder, outcome, module, seconds, index, known or self.bench.deploy(outcome.model))
        if kept_right(stage.model, stage.deployed, folder):
            return stage
        deployed = self.bench.deploy(stage.model, saved=True)
        return self._kept(name, folder, outcome, module, seconds, index, deployed)

    def _kept(
        self,
        name: str,
        folder: Path,
        outcome: Outcome,
        module: nn.Module,
        seconds: float,
        index: int,
        deployed: AnyDeployed,
    ) -> Stage:
        """Measure and store a stage."""
        model = deployed.made_from or outcome.model
        if not is_quantized(model):
            module = model
        elif self.ctx.parts:  # the training of a quantization changes the model around the parts, too
            module = unmounted(model)
        records = merged(outcome.layers, deployed)
        self.ctx.progress(Event(step=name, phase="evaluate"))
        values = self._evaluate(predictor(model))
        counted = sample_macs(model, deployed)
        warnings = [*outcome.warnings, *deployed.notes]
        layers = [{"version": record.version, **asdict(record)} for record in records]
        if deployed.quantized:
            coverage = lowered(deployed, records)
            warnings += coverage.warnings
            layers = executed(layers, coverage)
        if counted.uncounted:
            warnings.append(f"operations without a MAC count: {', '.join(counted.uncounted)}")
        row: dict[str, Any] = {
            "name": name,
            "kind": "step" if index else "baseline",
            "metric": values,
            "parameters": number(parameters(model), "count"),
            "nonzero": number(nonzeros(model), "count"),
            "macs": number(counted.total, MACS_OF_PARTS if self.ctx.parts else "MACs per sample"),
            "size_bytes": size(deployed),
            "seconds": number(seconds, "s", machine="this") if index else not_measured("no work was done"),
            "layers": layers,
            "warnings": warnings,
            "history": [dict(entry) for entry in outcome.history],
            "evidence": dict(outcome.evidence),
        }
        stage = Stage(
            name=name, folder=folder, model=model, module=module, masks=outcome.masks, deployed=deployed, row=row
        )
        stage.keep(self.key)
        return stage

    def _evaluate(self, predict: Callable[..., Any]) -> dict[str, Any]:
        task, seed = self.ctx.task, self.ctx.seed
        values = {}
        for split, batches in (("val", task.val), ("test", task.test)):
            if batches is None:
                values[split] = not_measured(f"the task has no {split} batches")
                continue
            # every evaluation must see the same batches in the same order, whatever ran before
            with preserved_globals(seed), seeded_splits(task, seed):
                values[split] = number(task.evaluate(predict, split), self.metric.unit or "1")
        return values

    def report(self, stages: list[Stage], recipe: dict[str, Any]) -> dict[str, Any]:
        """Time all stages side by side, and return the content of `run.json`."""
        last = stages[-1]
        self.ctx.progress(Event(step="artifact", phase="evaluate"))
        artifact_metric = self._evaluate(last.deployed)
        runtime = self.ctx.target.runtime
        self.ctx.progress(Event(step="artifact", phase="measure latency"))
        median, largest = shared_examples([stage.deployed for stage in stages])
        timings = timed(stages, median, self.ctx.target, self.rounds, self.bench.worker)
        rows = [dict(stage.row) for stage in stages]
        rows.append(
            {
                **rows[-1],
                "name": "artifact",
                "kind": "artifact",
                "metric": artifact_metric,
                "layers": [],
                "history": [],
                "evidence": {},
                "warnings": [],
                "seconds": not_measured("no work was done"),
            }
        )
        largest_timings = (
            None if largest is None else timed(stages, largest, self.ctx.target, self.rounds, self.bench.worker)
        )
        compare_rows(rows, timings, runtime, tuple(self.ctx.parts), largest_timings)
        sizes = {}
        if median is not None and largest is not None and not isinstance(last.deployed, DeployedParts):
            named = (("median", median), ("largest", largest))
            sizes = {"sizes": {name: shapes_of(last.deployed, leaves) for name, leaves in named}}
        return {
            "format": RUN_FORMAT,
            "torchslim": __version__,
            "recipe": recipe,
            "metric": {
                "name": self.metric.name,
                "unit": self.metric.unit,
                "higher_is_better": self.metric.higher_is_better,
            },
            "target": asdict(self.ctx.target),
            "selected_on": "val",
            "reported_on": "test" if self.ctx.task.test is not None else "val (selected on val)",
            "batch": 1 if last.deployed.takes_single_samples else "as captured",
            **sizes,
            "machines": {"this": self.machine, **self.bench.other_machines()},
            "rows": rows,
        }
