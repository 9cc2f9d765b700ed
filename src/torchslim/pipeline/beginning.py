"""Before a run: copy the model, check the steps, and make the context that all steps share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from torchslim._version import __version__
from torchslim.artifact.remote import RUNTIMES
from torchslim.core.batches import take_first
from torchslim.core.files import digest
from torchslim.core.fingerprint import fingerprint
from torchslim.core.isolation import copy_model, preserved_globals
from torchslim.core.parts import WHOLE, select_parts
from torchslim.core.step import Context, Engine, Inputs, MakesModel, Step, check_order
from torchslim.core.task import Task
from torchslim.errors import RecipeError, TaskError
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.target_bench import Bench
from torchslim.runtimes import find_runtime
from torchslim.training.calibration import part_examples, spanning_examples
from torchslim.training.loaders import first_batch, seeded_splits


def check_before(model: nn.Module, steps: Sequence[Step], options: RunOptions) -> None:
    """Raise for errors that need neither data nor a copy of the model."""
    check_order(steps)
    find_runtime(options.target.runtime)
    if options.worker is not None and options.target.runtime not in RUNTIMES:
        raise RecipeError(
            f"a worker runs {', '.join(RUNTIMES)}, not {options.target.runtime!r}; name one of them, or give no worker"
        )
    if options.worker is not None and options.part is not None:
        raise RecipeError("a worker times whole models, as the code around parts stays here; leave part or worker out")
    if not any(True for _ in model.parameters()):
        raise TaskError(f"the model ({type(model).__name__}) has no parameters; there is nothing to compress")


@contextmanager
def ready(
    model: nn.Module, task: Task, steps: Sequence[Step], options: RunOptions
) -> Iterator[tuple[Context, Bench, str]]:
    """Copy the model and check the steps; yield the context of the run, its bench, and the digest of its inputs."""
    with preserved_globals(options.seed), seeded_splits(task, options.seed):
        copied, masks = copy_model(model)
        first = take_first(task.val, "val")
        ctx = _context(copied, masks, task, task.inputs(first), options)
        bench = Bench(
            task=task,
            example_inputs=ctx.example_inputs,
            target=options.target,
            steps=steps,
            examples=ctx.examples,
            dynamic_shapes=ctx.dynamic_shapes,
            parts=ctx.parts,
            worker=options.worker,
        )
        ctx = check_ctx = replace(ctx, workbench=bench)
        for step in steps:
            step.check(check_ctx)
            check_ctx = replace(check_ctx, model=begun(step, check_ctx.model, options.seed))
        key = origin(ctx, copied, first)
        # choices by latency are those of the machine that times
        yield ctx, bench, key if options.worker is None else digest(key, options.worker.machine())


def _context(
    copied: nn.Module, masks: Mapping[str, Tensor], task: Task, inputs: Inputs, options: RunOptions
) -> Context:
    """Make the context that all steps share."""
    teacher = copied if options.teacher is None else options.teacher
    automatic = options.dynamic_shapes == "auto" and options.example_inputs is None
    paths = select_parts(copied, options.part)
    return Context(
        task=task,
        model=copied,
        teacher=copy_model(teacher)[0].eval(),
        example_inputs=inputs if options.example_inputs is None else options.example_inputs,
        masks=masks,
        target=options.target,
        engine=options.engine or Engine(),
        seed=options.seed,
        progress=options.progress,
        examples=spanning_examples(task, options.seed) if automatic else (),
        dynamic_shapes=options.dynamic_shapes,
        parts={} if paths == (WHOLE,) else part_examples(copied, task, paths, options.seed),
        priors={} if options.sensitivity is None else options.sensitivity.priors(),
    )


def begun(step: Step, model: nn.Module | None, seed: int) -> nn.Module | None:
    """Return the model that a step's result is made from: the given model, or the step's own network."""
    return step.initial_model(model, seed) if isinstance(step, MakesModel) and model is not None else model


def origin(ctx: Context, model: nn.Module, batch: Any) -> str:
    """Digest of a run's inputs: both models' weights, the first batches, engine, priors, and torchslim's version."""
    train = first_batch(ctx.task) if ctx.task.train is not None else None
    teacher = fingerprint(ctx.teacher.state_dict())
    start = fingerprint(model.state_dict())
    priors = [dict(ctx.priors)] if ctx.priors else []
    sizes = [] if ctx.dynamic_shapes == "auto" else [repr(ctx.dynamic_shapes)]
    sizes += [repr(ctx.paths)] if ctx.parts else []
    return digest(
        __version__, start, teacher, asdict(ctx.engine), fingerprint(batch), fingerprint(train), *priors, *sizes
    )
