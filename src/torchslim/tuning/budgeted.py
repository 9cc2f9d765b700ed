"""Compress a model within a budget without a recipe: suggest one, search it, and return its best result."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from torch import nn

from torchslim.core.budget import Budget
from torchslim.core.files import present
from torchslim.core.step import Target
from torchslim.core.task import Task
from torchslim.errors import RecipeError
from torchslim.pipeline.document import load_document
from torchslim.pipeline.options import RunOptions
from torchslim.pipeline.recipe import parse_document
from torchslim.pipeline.result import Result
from torchslim.pipeline.runner import run_steps
from torchslim.tuning.search_loop import search
from torchslim.tuning.space import make_space
from torchslim.tuning.suggest import suggest

NAMES = {"model": "your.package:model", "task": "your.package:task"}


def compress_within(model: nn.Module, task: Task, budget: Budget, options: RunOptions) -> Result:
    """Suggest a recipe, search it, and return the best result within the budget, or else the nearest to it."""
    target = options.target
    suggestion = suggest(
        model,
        task,
        budget,
        runtime=target.runtime,
        names={**NAMES, **dict(options.names or {})},
        example_inputs=options.example_inputs,
        part=options.part,
        measure=False,  # the search measures for itself
    )
    document = {**suggestion.document, "seed": options.seed}
    if target.threads is not None:
        document["threads"] = target.threads
    temporary = None if options.workdir else tempfile.TemporaryDirectory(prefix="torchslim-")
    folder = Path(options.workdir or temporary.name)  # type: ignore[union-attr]
    space = make_space(document, "the suggested recipe")
    outcome = search(
        model,
        task,
        space,
        workdir=folder,
        teacher=options.teacher,
        example_inputs=options.example_inputs,
        dynamic_shapes=options.dynamic_shapes,
        part=options.part,
        rehearse=options.rehearse,
        worker=options.worker,
        progress=options.progress,
    )
    best = outcome.best
    if best is None:
        raise RecipeError(f"{outcome.verdict.text}; see {folder / 'search.json'} for why each trial failed")
    result = best.result
    if result is None:  # made by an earlier process or another worker: run it again on its finished steps
        written = best.folder / "recipe.toml"
        known = present(written)  # else another machine ran it
        recipe = parse_document(load_document(written), may_be_empty=True) if known else space.recipe(best.values)
        rerun_options = replace(
            options,
            rehearse=False,
            target=Target(runtime=recipe.target.runtime, threads=target.threads),
            workdir=folder / "runs" / f"{best.trial:03d}",
            stages=folder / "stages",
            names={"model": recipe.model, "task": recipe.task},
        )
        result = run_steps(model, task, recipe.steps, rerun_options)
    result.run["budget"] = outcome.data["verdict"]
    if not outcome.verdict.met:
        result.run["rows"][-1]["warnings"].append(outcome.verdict.text)
    return replace(result, _keep=(result._keep, temporary))
