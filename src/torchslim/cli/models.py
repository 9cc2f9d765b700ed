"""Commands that analyze a model: its channel groups, its sensitive layers, its latency on another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from torchslim.cli.console import EXAMPLE, default_name, progress_shown, with_report
from torchslim.core.search_path import current_folder_last
from torchslim.core.terminal import printable


@click.command(epilog=f"{EXAMPLE}torchslim inspect torchvision.models:resnet18 --input 1x3x224x224")
@click.argument("model")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]SIZES[:DTYPE]",
    help="An example input, as 1x3x224x224, 1x77:int64 or mask=1x77:bool; once for each. Not needed where "
    "MODEL gives (model, example_inputs).",
)
@click.option(
    "--heads",
    type=click.Choice(["auto", "whole", "dim"]),
    default="auto",
    show_default=True,
    help="How to prune attention: whole heads, or dimensions of every head.",
)
@click.option("--all", "everything", is_flag=True, help="Also list kernel extents, position tables and every member.")
@click.option("--sensitivity", "moved", is_flag=True, hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(model: str, inputs: tuple[str, ...], heads: Any, everything: bool, moved: bool, as_json: bool) -> None:
    """List the coupled channel groups and the residual blocks of a MODEL (module:callable), and why some must stay.

    For each group: how many channels it has, the parameters and the multiply-accumulates (of a run on the inputs given)
    that would go with all of them, everything else kept, and the weights that lose a slice with each channel. A weight
    between two groups counts for both. For each block: its name, and the parameters and multiply-accumulates that go
    with it.
    """
    from torchslim.pipeline.model_spec import load_model
    from torchslim.prune import inspect as look

    if moved:
        raise click.UsageError(f"another command measures sensitivity: torchslim sensitivity {model}")
    if (Path(model) / "artifact.json").is_file():
        raise click.UsageError(f"{model} is an artifact; list its kernels with: torchslim kernels {model}")
    current_folder_last()
    network, example_inputs = load_model(model, inputs)
    groups = look(network, example_inputs, heads=heads)
    click.echo(
        json.dumps(groups.to_dict(), indent=1) if as_json else printable(groups.table(all=everything), lines=True)
    )


@click.command(epilog=f"{EXAMPLE}torchslim sensitivity recipe.toml --measure kl")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--measure",
    type=click.Choice(["sqnr", "kl", "metric"]),
    default="sqnr",
    show_default=True,
    help="Noise or divergence of the outputs, or the metric on val.",
)
@click.option("--reconstruct", is_flag=True, help="Solve for the weights that read a pruned group before measuring.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default runs/NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def sensitivity(recipe: Path, measure: Any, reconstruct: bool, out: Path | None, as_json: bool) -> None:
    """Measure what pruning one group alone, or quantizing one layer alone, does to the outputs of a RECIPE's model.

    Writes sensitivity.json and sensitivity.html. An interrupted analysis resumes.
    """
    from torchslim.analysis.sensitivity import sensitivity as analyze
    from torchslim.core.files import write_bytes
    from torchslim.pipeline.document import load_document
    from torchslim.pipeline.recipe import made
    from torchslim.report.sensitivity_page import render_sensitivity

    current_folder_last()
    document = load_document(recipe)
    model, task, _ = made(document)
    runtime = document.get("runtime", "onnxruntime")
    if isinstance(runtime, dict):  # a range of a search: take its first runtime
        runtime = next(iter(runtime.get("search", ())), "onnxruntime")
    out = out or Path("runs") / default_name(recipe)
    with progress_shown() as progress:
        result = analyze(
            model,
            task,
            measure=measure,
            reconstruct=reconstruct,
            runtime=runtime,
            seed=document.get("seed", 0),
            name=document["model"],
            progress=progress,
            part=document.get("part"),
        )
    path = result.save(out / "sensitivity.json")
    write_bytes(out / "sensitivity.html", render_sensitivity(result.to_dict()).encode())
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1))
    else:
        click.echo(with_report(result, path.with_suffix(".html")))


@click.command(epilog=f"{EXAMPLE}torchslim latency recipe.toml --pack board/")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--pack", "folder", type=click.Path(path_type=Path), required=True, help="Folder to write.")
def latency(recipe: Path, folder: Path) -> None:
    """Pack the programs that another machine must time, so that a recipe can prune to a latency there.

    Copy the folder, run `python bench.py` in it (it needs numpy and the runtime alone), and name the latency.json that
    it writes in the recipe: latency_table = "board/latency.json".
    """
    from torchslim.pipeline.latency_pack import pack
    from torchslim.pipeline.recipe import load_recipe

    current_folder_last()
    parsed = load_recipe(recipe)
    model, task, _ = parsed.load()
    with progress_shown() as progress:
        pack(model, task, parsed.steps, folder, target=parsed.target, progress=progress, part=parsed.part)
    click.echo(f"{folder}: copy it, run `python bench.py` there, and give its latency.json as latency_table")
