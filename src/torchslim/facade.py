"""`torchslim.compress`: given steps are run, and for a budget they are searched. Only this module sees both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchslim.analysis.result import Sensitivity
from torchslim.core.arguments import checks_arguments
from torchslim.core.budget import Budget
from torchslim.core.step import Engine, Event, Inputs, Step, Target, ignore_progress
from torchslim.core.task import Task
from torchslim.core.usable import usable
from torchslim.errors import RecipeError
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.result import Result
from torchslim.pipeline.runner import run_steps


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
    dynamic_shapes: Any = "batch",
    teacher: nn.Module | None = None,
    engine: Engine | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    overwrite: bool = False,
    stages: str | Path | None = None,
    names: Mapping[str, str] | None = None,
    sensitivity: Sensitivity | str | Path | None = None,
    progress: Callable[[Event], None] = ignore_progress,
) -> Result:
    """Take the steps on a copy of the model, and measure the model after each and the artifact that ships.

    Args:
        model: a trained module; it, its modes, the random state and torch's global settings are left as they were.
        task: data and metric.
        steps: run in this order, which is checked before any data is loaded.
        budget: in place of steps: they are derived from the model, the machine and the task (`ts.suggest`), searched
            for what keeps the bounds, and the best is returned; where nothing keeps them, the nearest, which says so.
        runtime: where the result will run; the baseline is measured there too.
        threads: of the deployment; None leaves it to the runtime.
        example_inputs: what is exported; by default the inputs of the first validation batch.
        dynamic_shapes: "batch", None, or a torch.export spec.
        teacher: what distillation learns from; by default the original model.
        engine: devices and precision of training.
        seed: of everything random.
        workdir: where finished steps and checkpoints are kept. Run again with the same folder, a killed run goes on,
            and ends as an undisturbed one does. Without it nothing can be resumed.
        overwrite: take a folder that holds another recipe's run; its steps are used where they are the same.
        stages: a folder in which several runs share their finished steps; by default each keeps its own in `workdir`.
        names: what the model and the task are called, for the report and to tell recipes apart.
        sensitivity: what `ts.sensitivity` found, or the file it was saved to: how much changes of a layer are known to
            hurt, which pruning under a latency and the choice of layers to quantize look at.
        progress: called with an `Event` as things go on.

    Raises:
        TorchslimError: one of its kinds, with what is wrong, what was got, and how to mend it.
    """
    if (steps is None) == (budget is None):
        raise RecipeError("give steps=[...] to take, or budget=Budget(...) to have them found, and not both")
    if budget is not None and not (engine is None and stages is None and sensitivity is None):
        raise RecipeError(
            "engine, stages and sensitivity go with steps, not with budget; ts.search takes a recipe with all"
        )
    model = usable(model)
    options = RunOptions(
        target=Target(runtime=runtime, threads=threads),
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        teacher=None if teacher is None else usable(teacher, what="the teacher"),
        engine=engine,
        seed=seed,
        workdir=workdir,
        overwrite=overwrite,
        stages=stages,
        names=names,
        sensitivity=Sensitivity.load(sensitivity) if isinstance(sensitivity, (str, Path)) else sensitivity,
        progress=progress,
    )
    if budget is None:
        return run_steps(model, task, steps or (), options)
    from torchslim.tuning.budgeted import compress_within

    return compress_within(model, task, budget, options)
