"""Commands to start with: a demo, a starter project, and the list of names."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files as resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import click

from torchslim.cli.console import EXAMPLE, default_name, with_report
from torchslim.cli.runs import carried_out
from torchslim.core.search_path import current_folder_last
from torchslim.core.step import step_name

STARTERS = ("images", "text", "series", "detection")
CLASSES, NUMBERS = '{ do = "kd", temperature = 4.0, alpha = 0.9 }', '{ do = "mse" }'  # response losses of a student


@click.command(epilog=f"{EXAMPLE}torchslim init my_project --from text")
@click.argument("folder", type=click.Path(path_type=Path), default=Path())
@click.option(
    "--from",
    "kind",
    type=click.Choice(STARTERS),
    default="images",
    show_default=True,
    help="Kind of the starter's random data; replace it by your own.",
)
def init(folder: Path, kind: str) -> None:
    """Write a starter to FOLDER: task.py with a model, data and a metric, and recipe.toml; they run as they are."""
    from torchslim.core.files import write_bytes

    starters = _starters()
    recipe = (starters / "recipe.toml").read_text()
    contents = {
        "task.py": (starters / f"{kind}.py").read_text(),
        "recipe.toml": recipe.replace(CLASSES, NUMBERS) if kind == "detection" else recipe,
    }
    if existing := [name for name in contents if (folder / name).exists()]:
        raise click.UsageError(f"{folder} has {' and '.join(existing)} already; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_bytes(folder / name, content.encode())
    click.echo(f"{folder / 'task.py'}\n{folder / 'recipe.toml'}\n\nnext: cd {folder} && torchslim run recipe.toml")


def _starters() -> Traversable:
    return resources("torchslim.pipeline.starters")


@click.command(epilog=f"{EXAMPLE}torchslim demo --out demo/")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results; default runs/NAME.")
def demo(recipe: Path | None, out: Path | None) -> None:
    """Show a first result within a minute, int8 alone; then run the whole RECIPE. An interrupted demo resumes.

    Without RECIPE: the starter of `torchslim init --from images`, on generated images.
    """
    from torchslim.pipeline.recipe import load_recipe, parse_recipe
    from torchslim.quantize import Quantize

    current_folder_last()
    if recipe is None:
        starter = "torchslim.pipeline.starters.images"
        parsed = parse_recipe((_starters() / "recipe.toml").read_text())
        parsed = replace(parsed, model=f"{starter}:model", task=f"{starter}:task")
    else:
        parsed = load_recipe(recipe)
    out = out or Path("runs") / ("demo" if recipe is None else default_name(recipe))
    first = replace(parsed, steps=(Quantize("int8"),))
    for about, steps, folder in (("int8 alone", first, out / "int8"), ("the whole recipe", parsed, out)):
        click.echo(f"{about}: {' -> '.join(step_name(step) for step in steps.steps)}", err=True)
        # int8 alone is as short as its rehearsal
        result = carried_out(steps, folder, stages=out / "stages", rehearse=steps is parsed and parsed.rehearse)
        if result is not None:
            click.echo(f"\n{about}\n{with_report(result, folder / 'report.html')}\n")
    if recipe is None:
        click.echo("next, your own model: torchslim init")


@click.command("list", epilog=f"{EXAMPLE}torchslim list --json")
@click.option("--json", "as_json", is_flag=True)
def list_(as_json: bool) -> None:
    """List steps, criteria, patterns, losses, schemes, metrics and runtimes."""
    from torchslim.core.metrics import METRICS
    from torchslim.distill import LOSSES
    from torchslim.pipeline.recipe import STEPS
    from torchslim.prune import BLOCK_CRITERIA, CRITERIA, PATTERNS
    from torchslim.quantize import SCHEMES
    from torchslim.runtimes import RUNTIMES

    tables = {
        "steps": {name: _about(kind) for name, kind in STEPS.items()},
        "criteria": {name: criterion.about for name, criterion in CRITERIA.items()},
        "criteria of blocks": dict(BLOCK_CRITERIA),
        "patterns": dict(PATTERNS),
        "losses": {name: _about(kind) for name, kind in LOSSES.items()},
        "schemes": {name: scheme.about for name, scheme in SCHEMES.items()},
        "metrics": {name: "higher is better" if row[1] else "lower is better" for name, row in METRICS.items()},
        "runtimes": dict(RUNTIMES),
    }
    if as_json:
        click.echo(json.dumps(tables, indent=1))
        return
    width = max(len(name) for rows in tables.values() for name in rows)
    for kind, rows in tables.items():
        click.echo(click.style(kind, bold=True))
        for name, about in rows.items():
            click.echo(f"  {name:<{width}}  {about}")


def _about(documented: Any) -> str:
    return (documented.__doc__ or "").strip().split("\n")[0]
