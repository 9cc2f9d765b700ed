"""Commands that run, search, derive or check a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchslim.cli.console import EXAMPLE, default_name, progress_shown, with_report
from torchslim.cli.timing import ON, TOKEN, worker_at
from torchslim.core.search_path import current_folder_last
from torchslim.core.step import step_name

if TYPE_CHECKING:
    from torchslim.artifact.remote import TimingWorker
    from torchslim.pipeline.recipe import Recipe
    from torchslim.pipeline.result import Result


@click.command(epilog=f"{EXAMPLE}torchslim run recipe.toml --out out/")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the result; default runs/NAME.")
@click.option("--overwrite", is_flag=True, help="Replace another recipe's run in the folder.")
@click.option("--key", type=click.Path(path_type=Path), help="Sign the artifact with this private key (PEM, Ed25519).")
@click.option("--no-rehearse", is_flag=True, help="Begin at once, without trying every step at least effort.")
@ON
@TOKEN
@click.option("--json", "as_json", is_flag=True, help="Print run.json instead of the table.")
def run(
    recipe: Path,
    out: Path | None,
    overwrite: bool,
    key: Path | None,
    no_rehearse: bool,
    on: str | None,
    token: Path | None,
    as_json: bool,
) -> None:
    """Run a recipe; an interrupted run resumes.

    A rehearsal comes first: every step at least effort, so that nothing fails late, and a forecast of the time.

    On several devices: torchrun --nproc-per-node 2 -m torchslim run recipe.toml
    """
    from torchslim.pipeline.recipe import load_recipe

    current_folder_last()
    out = out or Path("runs") / default_name(recipe)
    parsed = load_recipe(recipe)
    worker, rehearse = worker_at(on, token), parsed.rehearse and not no_rehearse
    result = carried_out(parsed, out, overwrite=overwrite, key=key, rehearse=rehearse, worker=worker)
    if result is not None:
        click.echo(json.dumps(result.run, indent=1) if as_json else with_report(result, out / "report.html"))


def carried_out(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    key: Path | None = None,
    stages: Path | None = None,
    rehearse: bool = True,
    worker: TimingWorker | None = None,
) -> Result | None:
    """Run a recipe and save its result in `out`; returns None in all processes except the first, which writes."""
    from torchslim.core import distributed
    from torchslim.core.step import ignore_progress
    from torchslim.facade import compress

    model, task, teacher = recipe.load()
    with progress_shown() as progress:
        result = compress(
            model,
            task,
            recipe.steps,
            runtime=recipe.target.runtime,
            threads=recipe.target.threads,
            teacher=teacher,
            engine=recipe.engine,
            dynamic_shapes=recipe.dynamic_shapes,
            part=recipe.part,
            seed=recipe.seed,
            workdir=out / "work",
            overwrite=overwrite,
            stages=stages,
            names={"model": recipe.model, "task": recipe.task},
            sensitivity=recipe.sensitivity,
            rehearse=rehearse,
            worker=worker,
            progress=progress if distributed.is_first() else ignore_progress,
        )
        if not distributed.is_first():
            return None
        result.save(out, key=key)
    return result


@click.command(epilog=f"{EXAMPLE}torchslim search recipe.toml --storage postgresql+psycopg://user@host/studies")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the search; default runs/NAME-search.")
@click.option("--storage", help="Storage that workers share: an Optuna URL or a file; default: a file in the folder.")
@click.option("--study", help="Name of the study in the storage; default: the folder's name.")
@click.option("--no-rehearse", is_flag=True, help="Begin at once, without trying every step at least effort.")
@ON
@TOKEN
@click.option("--json", "as_json", is_flag=True, help="Print search.json instead of the table.")
def search(
    recipe: Path,
    out: Path | None,
    storage: str | None,
    study: str | None,
    no_rehearse: bool,
    on: str | None,
    token: Path | None,
    as_json: bool,
) -> None:
    """Search a recipe with ranges for the best results under its budget; an interrupted search resumes.

    Start it several times, on any number of machines, with one --storage: all processes share one search.
    """
    from torchslim.core import distributed
    from torchslim.core.step import ignore_progress
    from torchslim.pipeline.document import load_document
    from torchslim.pipeline.recipe import made
    from torchslim.tuning import make_space
    from torchslim.tuning import search as look

    current_folder_last()
    space = make_space(load_document(recipe), str(recipe))
    model, task, teacher = made(space.document)
    out = out or Path("runs") / f"{default_name(recipe)}-search"
    with progress_shown() as progress:
        result = look(
            model,
            task,
            space,
            workdir=out,
            teacher=teacher,
            storage=storage,
            study=study,
            rehearse=not no_rehearse,
            worker=worker_at(on, token),
            progress=progress if distributed.is_first() else ignore_progress,
        )
    if distributed.is_first():
        click.echo(json.dumps(result.data, indent=1) if as_json else with_report(result, out / "report.html"))


@click.command(epilog=f"{EXAMPLE}torchslim suggest package.module:model package.module:task --latency-ms 3")
@click.argument("model", metavar="MODEL")
@click.argument("task", metavar="TASK")
@click.option("--latency-ms", type=float, help="Upper bound of the latency of one sample.")
@click.option("--metric-drop", type=float, help="Largest allowed loss in the metric, in its own unit.")
@click.option("--size-mb", type=float, help="Upper bound of the size of the artifact's model file.")
@click.option("--runtime", help="Runtime to deploy on; by default the search chooses among those installed.")
@click.option("--part", multiple=True, help="A submodule, or a glob of some, that the recipe changes; repeatable.")
@click.option("--measure/--no-measure", default=True, help="Try plain 8-bit rounding on every runtime, and time it.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the recipe there instead of printing it.")
def suggest(
    model: str,
    task: str,
    runtime: str | None,
    part: tuple[str, ...],
    measure: bool,
    out: Path | None,
    **bounds: float | None,
) -> None:
    """Derive a recipe to search from a MODEL and a TASK, each module:callable, and this machine; nothing is trained.

    torchslim search runs the recipe unchanged.
    """
    from torchslim.core.budget import Budget
    from torchslim.core.files import write_bytes
    from torchslim.pipeline.recipe import made
    from torchslim.tuning.suggest import suggest as derive

    current_folder_last()
    budget = Budget(**{name: value for name, value in bounds.items() if value is not None})  # type: ignore[arg-type]
    names = {"model": model, "task": task}
    network, loaded_task, _ = made(names)
    options: dict[str, Any] = {"runtime": runtime, "names": names, "part": part or None, "measure": measure}
    suggestion = derive(network, loaded_task, budget, **options)
    if out is None:
        click.echo(suggestion.toml, nl=False)
        return
    write_bytes(out, suggestion.toml.encode())
    click.echo("\n".join(suggestion.reasons))
    click.echo(f"\nrecipe: {out}")


@click.command(epilog=f"{EXAMPLE}torchslim check recipe.toml")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--rehearse", is_flag=True, help="Also take every step at least effort, and forecast the time.")
@click.option("--json", "as_json", is_flag=True, help="Print the steps as JSON.")
def check(recipe: Path, rehearse: bool, as_json: bool) -> None:
    """Check a recipe without running it: its keys, the order of its steps, and the imports of the names in it.

    With --rehearse also the rehearsal that a run begins with; of a recipe with ranges, with their first values.
    """
    from torchslim.core.fingerprint import canonical
    from torchslim.pipeline.document import load_document
    from torchslim.pipeline.recipe import check_names, parse_document
    from torchslim.tuning import make_space
    from torchslim.tuning.space import has_ranges

    current_folder_last()
    document = load_document(recipe)
    space = make_space(document, str(recipe)) if has_ranges(document) else None
    parsed = space.recipe(space.first) if space else parse_document(document, str(recipe))
    check_names(document)
    if rehearse:
        _rehearsed(parsed)
    if as_json:
        click.echo(json.dumps([canonical(step) for step in parsed.steps], indent=1))
    else:
        click.echo(f"{recipe}: {' -> '.join(step_name(step) for step in parsed.steps)} -> {parsed.target.runtime}: ok")
        for parameter in space.parameters if space else ():
            ends = f"{parameter.low} to {parameter.high}"
            click.echo(f"  {parameter.name}: {', '.join(map(str, parameter.ends)) if parameter.choices else ends}")


def _rehearsed(recipe: Recipe) -> None:
    """Rehearse a recipe, and show the forecast."""
    from torchslim.core import distributed
    from torchslim.core.step import ignore_progress
    from torchslim.pipeline.options import RunOptions
    from torchslim.pipeline.runner import rehearse_steps

    model, task, teacher = recipe.load()
    with progress_shown() as progress:
        options = RunOptions(
            target=recipe.target,
            teacher=teacher,
            engine=recipe.engine,
            dynamic_shapes=recipe.dynamic_shapes,
            part=recipe.part,
            seed=recipe.seed,
            sensitivity=recipe.known_sensitivity(),
            progress=progress if distributed.is_first() else ignore_progress,
        )
        rehearse_steps(model, task, recipe.steps, options)
