"""`torchslim.compress`: given steps are run, and for a budget they are searched. Only this module sees both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchslim.analysis.result import Sensitivity
from torchslim.core.arguments import checks_arguments
from torchslim.core.budget import Budget
from torchslim.core.step import Engine, Event, Inputs, Step, Target, log_progress
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
    progress: Callable[[Event], None] = log_progress,
) -> Result:
    """Run the steps on a copy of the model; measure the model after every step, and the artifact that ships.

    Args:
        model: a trained module. It, its modes, the random state and torch's global settings are never modified.
        task: data and metric.
        steps: in the order in which they run; the order is checked before any data are loaded.
        budget: instead of steps. A recipe is derived from the model, the machine and the task (`ts.suggest`) and
            searched; the best result within the limits is returned, or the nearest to them, with a note.
        runtime: where the result will run; the baseline is measured there too.
        threads: of the deployed model; None: the runtime decides.
        example_inputs: what the model is exported with; default: the inputs of the first validation batch.
        dynamic_shapes: "batch", None, or a torch.export spec.
        teacher: what distillation learns from; default: the original model.
        engine: devices and precision of training.
        seed: of everything random.
        workdir: folder of finished steps and checkpoints. An interrupted run resumes there and gives the same result.
        overwrite: use a folder that holds the run of another recipe; its steps are reused where they are the same.
        stages: a folder in which several runs share finished steps; default: a folder in `workdir`.
        names: names of the model and the task, for the report and to tell recipes apart.
        sensitivity: a result of `ts.sensitivity`, or its file: which layers are easily damaged. Pruning to a latency
            and the choice of layers to quantize use it.
        progress: called with an `Event` at every phase.

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
