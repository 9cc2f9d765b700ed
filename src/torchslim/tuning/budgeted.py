"""A model within a budget, without a recipe: one is suggested, searched, and its best candidate returned."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from torchslim.core.budget import Budget
from torchslim.core.step import Event, Inputs
from torchslim.core.task import Task
from torchslim.errors import RecipeError
from torchslim.pipeline.runner import Result, compress
from torchslim.tuning.search import search
from torchslim.tuning.space import make_space
from torchslim.tuning.suggest import suggest

NAMES = {"model": "your.package:model", "task": "your.package:task"}


def compress_within(
    model: nn.Module,
    task: Task,
    budget: Budget,
    *,
    runtime: str,
    threads: int | None,
    example_inputs: Inputs | None,
    dynamic_shapes: Any,
    teacher: nn.Module | None,
    seed: int,
    workdir: str | Path | None,
    names: Mapping[str, str] | None,
    progress: Callable[[Event], None],
) -> Result:
    """What `compress(budget=...)` does; see there."""
    suggestion = suggest(
        model, task, budget, runtime=runtime, names={**NAMES, **dict(names or {})}, example_inputs=example_inputs
    )
    document = {**suggestion.document, "seed": seed} | ({} if threads is None else {"threads": threads})
    keep = None if workdir else tempfile.TemporaryDirectory(prefix="torchslim-")
    folder = Path(workdir or keep.name)  # type: ignore[union-attr]
    space = make_space(document, "the suggested recipe")
    found = search(
        space, model, task, workdir=folder, teacher=teacher, example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes, progress=progress,
    )  # fmt: skip
    best = found.best
    if best is None:
        raise RecipeError(f"{found.verdict.text}; see {folder / 'search.json'} for why each trial failed")
    result = best.result
    if result is None:  # an earlier process, or another worker, has made it: its finished steps are taken up
        recipe = space.recipe(best.values)
        result = compress(
            model, task, recipe.steps, runtime=recipe.target.runtime, threads=threads, example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes, teacher=teacher, seed=seed, workdir=folder / "runs" / f"{best.trial:03d}",
            stages=folder / "stages", names={"model": recipe.model, "task": recipe.task}, progress=progress,
        )  # fmt: skip
    result.run["budget"] = found.data["verdict"]
    if not found.verdict.met:
        result.run["rows"][-1]["warnings"].append(found.verdict.text)
    return replace(result, _keep=(result._keep, keep))
