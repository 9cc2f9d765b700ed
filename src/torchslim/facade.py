"""`torchslim.compress`: runs steps, or searches them for a budget; only this module imports both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchslim.analysis.result import Sensitivity
from torchslim.artifact.remote import TimingWorker
from torchslim.core.arguments import checks_arguments
from torchslim.core.budget import Budget
from torchslim.core.step import Engine, Event, Inputs, Step, Target, log_progress
from torchslim.core.task import Task
from torchslim.core.usable import usable
from torchslim.errors import RecipeError
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.result import Result
from torchslim.pipeline.runner import run_steps
from torchslim.tuning.budgeted import compress_within


@checks_arguments(RecipeError)
def compress(
    model: nn.Module,
    task: Task,
    steps: Sequence[Step] | None = None,
    *,
    budget: Budget | None = None,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    example_inputs: Inputs | None = None,
    dynamic_shapes: Any = "auto",
    part: str | Sequence[str] | None = None,
    teacher: nn.Module | None = None,
    engine: Engine | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    overwrite: bool = False,
    stages: str | Path | None = None,
    names: Mapping[str, str] | None = None,
    sensitivity: Sensitivity | str | Path | None = None,
    rehearse: bool = True,
    worker: TimingWorker | None = None,
    progress: Callable[[Event], None] = log_progress,
) -> Result:
    """Run the steps on a copy of the model; measure the model after every step, and the artifact that ships.

    Args:
        model: a trained module. It, its modes, the random state and torch's global settings are never modified.
        task: data and metric.
        steps: in running order, which is checked before any data are loaded.
        budget: instead of steps: search for the recipe; returns the best result in the budget, or else the nearest.
        runtime, threads: of the deployed model and the baseline; threads=None: the runtime decides.
        example_inputs: inputs of the export; default: those of the first validation batch.
        dynamic_shapes: "auto" leaves free the batch and every size that differs between batches, such as the length of
            padded sentences; "batch" the batch alone; None fixes all sizes; or a torch.export spec.
        part: names or globs of submodules that the steps change and that are deployed; the code around them stays in
            Python. Metric, teacher and trainings see the whole model. None: the whole model.
        teacher: of distillation; default: the original model.
        engine, seed: devices and precision of training; seed of everything random.
        workdir: folder of finished steps and checkpoints. An interrupted run resumes there and gives the same result.
        overwrite: use a folder with the run of another recipe, and reuse the steps that are the same.
        stages: folder of finished steps that several runs share; default: a folder in `workdir`.
        names: of the model and the task, for the report and to tell recipes apart.
        sensitivity: result of `ts.sensitivity` or its file; guides pruning to a latency and layers="auto".
        rehearse: begin with every step at least effort, through the code of the run, so that nothing fails late; then
            show a forecast. A rehearsal that passed in `workdir` is not repeated.
        worker: a `ts.TimingWorker`, a machine that times programs: the model is trained here and timed there, on the
            device that counts. Eager PyTorch is timed here. None: everything is timed here.
        progress: called with an `Event` at every phase.

    Raises:
        TorchslimError: one of its kinds; the message names the fault, the value and the remedy.
    """
    _check_choice(steps, budget, engine, stages, sensitivity)
    model = usable(model)
    options = RunOptions(
        target=Target(runtime=runtime, threads=threads),
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        part=part,
        teacher=None if teacher is None else usable(teacher, what="the teacher"),
        engine=engine,
        seed=seed,
        workdir=workdir,
        overwrite=overwrite,
        stages=stages,
        names=names,
        sensitivity=Sensitivity.load(sensitivity) if isinstance(sensitivity, (str, Path)) else sensitivity,
        rehearse=rehearse,
        worker=worker,
        progress=progress,
    )
    return _run(model, task, steps, budget, options)


def _run(
    model: nn.Module, task: Task, steps: Sequence[Step] | None, budget: Budget | None, options: RunOptions
) -> Result:
    if budget is not None:
        return compress_within(model, task, budget, options)
    return run_steps(model, task, steps or (), options)


def _check_choice(steps: Sequence[Step] | None, budget: Budget | None, *options_of_steps: Any) -> None:
    """Raise RecipeError unless there are either steps, or a budget without options that go with steps."""
    if (steps is None) == (budget is None):
        raise RecipeError("give steps=[...] to take, or budget=Budget(...) to have them found, and not both")
    if budget is not None and any(option is not None for option in options_of_steps):
        raise RecipeError(
            "engine, stages and sensitivity go with steps, not with budget; ts.search takes a recipe with all"
        )
