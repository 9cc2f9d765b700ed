"""The command line: everything is a thin call of the library; only here is anything drawn."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchslim.core.search_path import current_folder_last
from torchslim.core.terminal import printable

if TYPE_CHECKING:
    from torchslim.core.step import Event

EXAMPLE = "\b\nExample:\n  "


@click.group(epilog=f"{EXAMPLE}torchslim run examples/fashion_mnist/recipe.toml")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="torchslim")
def cli(debug: bool) -> None:
    """Prune, distill and quantize a trained PyTorch model, and measure what ships."""


@cli.command(epilog=f"{EXAMPLE}torchslim run recipe.toml --out out/")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the result; default runs/NAME.")
@click.option("--overwrite", is_flag=True, help="Take a folder that holds another recipe's run.")
@click.option("--key", type=click.Path(path_type=Path), help="Sign the artifact with this private key (PEM, Ed25519).")
@click.option("--json", "as_json", is_flag=True, help="Print run.json instead of the table.")
def run(recipe: Path, out: Path | None, overwrite: bool, key: Path | None, as_json: bool) -> None:
    """Run a recipe; run again after a kill, it goes on where it stopped.

    On several devices: torchrun --nproc-per-node 2 -m torchslim run recipe.toml
    """
    from torchslim.core import distributed
    from torchslim.core.step import ignore_progress
    from torchslim.facade import compress
    from torchslim.pipeline.recipe import load_recipe

    current_folder_last()
    parsed = load_recipe(recipe)
    model, task, teacher = parsed.load()
    out = out or Path("runs") / _name(recipe)
    with _progress() as progress:
        result = compress(
            model,
            task,
            parsed.steps,
            runtime=parsed.target.runtime,
            threads=parsed.target.threads,
            teacher=teacher,
            engine=parsed.engine,
            seed=parsed.seed,
            workdir=out / "work",
            overwrite=overwrite,
            names={"model": parsed.model, "task": parsed.task},
            sensitivity=parsed.sensitivity,
            progress=progress if distributed.is_first() else ignore_progress,
        )
        if not distributed.is_first():
            return  # one writes and reports for all
        result.save(out, key=key)
    if as_json:
        click.echo(json.dumps(result.run, indent=1))
    else:
        click.echo(printable(str(result), lines=True))
        click.echo(f"\nreport: {out / 'report.html'}")


@cli.command(epilog=f"{EXAMPLE}torchslim search recipe.toml --storage postgresql+psycopg://user@host/studies")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the search; default runs/NAME-search.")
@click.option("--storage", help="What workers share: an Optuna URL, or a file; default: a file in the folder.")
@click.option("--study", help="Name of the study in the storage; default: the folder's name.")
@click.option("--json", "as_json", is_flag=True, help="Print search.json instead of the table.")
def search(recipe: Path, out: Path | None, storage: str | None, study: str | None, as_json: bool) -> None:
    """Search a recipe with ranges for the best under its budget; run again after a kill, it goes on.

    Started several times, on any number of machines, with one --storage, all work on one search.
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
    out = out or Path("runs") / f"{_name(recipe)}-search"
    with _progress() as progress:
        found = look(
            model, task, space, workdir=out, teacher=teacher, storage=storage, study=study,
            progress=progress if distributed.is_first() else ignore_progress,
        )  # fmt: skip
    if distributed.is_first():
        report = printable(f"{found}\n\nreport: {out / 'report.html'}", lines=True)
        click.echo(json.dumps(found.data, indent=1) if as_json else report)


@cli.command(epilog=f"{EXAMPLE}torchslim suggest package.module:model package.module:task --latency-ms 3")
@click.argument("model", metavar="MODEL")
@click.argument("task", metavar="TASK")
@click.option("--latency-ms", type=float, help="Of one sample a call, at most.")
@click.option("--metric-drop", type=float, help="How much worse the metric may be, at most, in its own unit.")
@click.option("--size-mb", type=float, help="Of the files that ship, at most.")
@click.option("--runtime", help="Where it will run; by default the search chooses among those installed.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the recipe there instead of printing it.")
def suggest(model: str, task: str, runtime: str | None, out: Path | None, **bounds: float | None) -> None:
    """Derive a recipe to search from a MODEL and a TASK, each module:callable, and this machine; nothing is trained.

    torchslim search takes it as it is.
    """
    from torchslim.core.budget import Budget
    from torchslim.core.files import write_bytes
    from torchslim.pipeline.recipe import made
    from torchslim.tuning.suggest import suggest as derive

    current_folder_last()
    budget = Budget(**{name: value for name, value in bounds.items() if value is not None})  # type: ignore[arg-type]
    names = {"model": model, "task": task}
    own, given, _ = made(names)
    found = derive(own, given, budget, runtime=runtime, names=names)
    if out is None:
        click.echo(found.toml, nl=False)
        return
    write_bytes(out, found.toml.encode())
    click.echo("\n".join(found.reasons))
    click.echo(f"\nrecipe: {out}")


@cli.command(epilog=f"{EXAMPLE}torchslim init my_project --from text")
@click.argument("folder", type=click.Path(path_type=Path), default=Path())
@click.option("--from", "kind", type=click.Choice(["images", "text", "series"]), default="images", show_default=True,
              help="The data that the starter draws; put your own in its place.")  # fmt: skip
def init(folder: Path, kind: str) -> None:
    """Write a starter to FOLDER: task.py with a model, data and a metric, and recipe.toml; they run as they are."""
    from importlib.resources import files as resources

    from torchslim.core.files import write_bytes

    starters = resources("torchslim.pipeline.starters")
    sources = {"task.py": starters / f"{kind}.py", "recipe.toml": starters / "recipe.toml"}
    if existing := [name for name in sources if (folder / name).exists()]:
        raise click.UsageError(f"{folder} has {' and '.join(existing)} already; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        write_bytes(folder / name, source.read_bytes())
    click.echo(f"{folder / 'task.py'}\n{folder / 'recipe.toml'}\n\nnext: cd {folder} && torchslim run recipe.toml")


@cli.command(epilog=f"{EXAMPLE}torchslim check recipe.toml")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the steps as JSON.")
def check(recipe: Path, as_json: bool) -> None:
    """Say whether a recipe would start: its keys, its order, and that what it names can be imported."""
    from torchslim.core.fingerprint import canonical
    from torchslim.core.step import step_name
    from torchslim.pipeline.document import load_document
    from torchslim.pipeline.recipe import check_names, parse_document
    from torchslim.tuning import make_space
    from torchslim.tuning.space import has_ranges

    current_folder_last()
    document = load_document(recipe)
    space = make_space(document, str(recipe)) if has_ranges(document) else None
    parsed = space.recipe(space.first) if space else parse_document(document, str(recipe))
    check_names(document)
    if as_json:
        click.echo(json.dumps([canonical(step) for step in parsed.steps], indent=1))
    else:
        click.echo(f"{recipe}: {' -> '.join(step_name(step) for step in parsed.steps)} -> {parsed.target.runtime}: ok")
        for parameter in space.parameters if space else ():
            ends = f"{parameter.low} to {parameter.high}"
            click.echo(f"  {parameter.name}: {', '.join(map(str, parameter.ends)) if parameter.choices else ends}")


@cli.command(epilog=f"{EXAMPLE}torchslim inspect torchvision.models:resnet18 --input 1x3x224x224")
@click.argument("model")
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]SIZES[:DTYPE]",
              help="An example input, as 1x3x224x224, 1x77:int64 or mask=1x77:bool; once for each. Not needed where "
              "MODEL gives (model, example_inputs).")  # fmt: skip
@click.option("--heads", type=click.Choice(["auto", "whole", "dim"]), default="auto", show_default=True,
              help="What attention may lose: whole heads, or dimensions of every head.")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Kernel extents and position tables too, and every member.")
@click.option("--sensitivity", "moved", is_flag=True, hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def inspect(
    model: str, inputs: tuple[str, ...], heads: Any, everything: bool, moved: bool, as_json: bool
) -> None:  # fmt: skip
    """List the coupled channel groups of a MODEL (module:callable), and why some must stay.

    For each group: how many channels it has, the parameters and the multiply-accumulates (of a run on the inputs given)
    that would go with all of them, everything else kept, and the weights that lose a slice with each channel. A weight
    between two groups counts for both.
    """
    from torchslim.pipeline.model_spec import load_model
    from torchslim.prune import inspect as look

    if moved:
        raise click.UsageError(f"a command of its own measures sensitivity: torchslim sensitivity {model}")
    if (Path(model) / "artifact.json").is_file():
        raise click.UsageError(f"{model} is an artifact; list its kernels with: torchslim kernels {model}")
    current_folder_last()
    made, example_inputs = load_model(model, inputs)
    found = look(made, example_inputs, heads=heads)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else printable(found.table(all=everything), lines=True))


@cli.command(epilog=f"{EXAMPLE}torchslim kernels out/")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--trusted", is_flag=True, help="Load an artifact of machine code too (runtime aoti).")
@click.option("--public-key", type=click.Path(path_type=Path),
              help="Refuse artifacts that are not signed with the private key of this one (PEM, Ed25519).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def kernels(artifact: Path, trusted: bool, public_key: Path | None, as_json: bool) -> None:
    """List the layers of an ARTIFACT (a saved folder) that run on integers, their kernels, and why others do not."""
    from torchslim.artifact.integer_coverage import lowered
    from torchslim.artifact.storage import load

    executed = lowered(load(artifact, trusted=trusted, public_key=public_key))
    click.echo(json.dumps(executed.to_dict(), indent=1) if as_json else printable(executed.table(), lines=True))


@cli.command(epilog=f"{EXAMPLE}torchslim sensitivity recipe.toml --measure kl")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--measure", type=click.Choice(["sqnr", "kl", "metric"]), default="sqnr", show_default=True,
              help="Noise or divergence of the outputs, or the metric on val.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default runs/NAME.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def sensitivity(recipe: Path, measure: Any, out: Path | None, as_json: bool) -> None:
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
    if isinstance(runtime, dict):  # of a search: the first that it would try
        runtime = next(iter(runtime.get("search", ())), "onnxruntime")
    out = out or Path("runs") / (recipe.stem if recipe.stem != "recipe" else recipe.resolve().parent.name)
    with _progress() as progress:
        found = analyze(
            model, task, measure=measure, runtime=runtime, seed=document.get("seed", 0), name=document["model"],
            progress=progress,
        )  # fmt: skip
    path = found.save(out / "sensitivity.json")
    write_bytes(out / "sensitivity.html", render_sensitivity(found.to_dict()).encode())
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        click.echo(printable(f"{found}\n\nreport: {path.with_suffix('.html')}", lines=True))


@cli.command(epilog=f"{EXAMPLE}torchslim latency recipe.toml --pack board/")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--pack", "folder", type=click.Path(path_type=Path), required=True, help="Folder to write.")
def latency(recipe: Path, folder: Path) -> None:
    """Pack what another machine must time, so that a recipe can prune to a latency there.

    Copy the folder, run `python bench.py` in it (it needs numpy and the runtime alone), and name the latency.json that
    it writes in the recipe: latency_table = "board/latency.json".
    """
    from torchslim.pipeline.latency_pack import pack
    from torchslim.pipeline.recipe import load_recipe

    current_folder_last()
    parsed = load_recipe(recipe)
    model, task, _ = parsed.load()
    with _progress() as progress:
        pack(model, task, parsed.steps, folder, target=parsed.target, progress=progress)
    click.echo(f"{folder}: copy it, run `python bench.py` there, and give its latency.json as latency_table")


@cli.command(epilog=f"{EXAMPLE}torchslim bench out/a out/b --batch 16")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(min=1), help="Samples a call; default 1 where the batch is free.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: what each artifact was saved with.")
@click.option("--rounds", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--trusted", is_flag=True, help="Load artifacts of machine code too (runtime aoti).")
@click.option("--public-key", type=click.Path(path_type=Path),
              help="Refuse artifacts that are not signed with the private key of this one (PEM, Ed25519).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True)
def bench(
    artifacts: tuple[Path, ...], batch: int | None, threads: int | None, rounds: int, trusted: bool,
    public_key: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Time saved artifacts side by side, interleaved; ratios are over the first."""
    from torchslim.artifact.latency import compare
    from torchslim.artifact.storage import load, render_timings

    loaded = {str(path): load(path, threads=threads, trusted=trusted, public_key=public_key) for path in artifacts}
    rows = render_timings(compare(loaded, batch=batch, rounds=rounds), str(artifacts[0]))
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    width = max(len(row["artifact"]) for row in rows)
    click.echo(f"{'artifact':<{width}}  {'latency ms [p10-p90]':>26}  {'speed-up [p10-p90]':>24}")
    for row in rows:
        row["artifact"] = printable(row["artifact"])
        took, ratio = row["latency_ms"], row["speedup"]
        latency = f"{took['median']:.3f} [{took['p10']:.3f}-{took['p90']:.3f}]"
        speedup = f"{ratio['median']:.2f}x [{ratio['p10']:.2f}-{ratio['p90']:.2f}]"
        click.echo(f"{row['artifact']:<{width}}  {latency:>26}  {speedup:>24}  {ratio['verdict']}")


@cli.command(epilog=f"{EXAMPLE}torchslim report runs/fashion_mnist")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Default: report.html beside it.")
def report(folder: Path, out: Path | None) -> None:
    """Make the report page again from run.json, search.json or sensitivity.json, and print the table."""
    from torchslim.core.files import write_bytes
    from torchslim.report import REPORTS, kind_of

    load, render, table = REPORTS[kind_of(folder)]
    found = load(folder)
    out = out or (folder if folder.is_dir() else folder.parent) / "report.html"
    write_bytes(out, render(found).encode())
    click.echo(printable(table(found), lines=True))
    click.echo(f"\nreport: {out}")


@cli.command("list", epilog=f"{EXAMPLE}torchslim list --json")
@click.option("--json", "as_json", is_flag=True)
def list_(as_json: bool) -> None:
    """List steps, criteria, patterns, losses, schemes, metrics and runtimes."""
    from torchslim.core.metrics import METRICS
    from torchslim.distill import LOSSES
    from torchslim.pipeline.recipe import STEPS
    from torchslim.prune import CRITERIA, PATTERNS
    from torchslim.quantize import SCHEMES
    from torchslim.runtimes import RUNTIMES

    known = {
        "steps": {name: _about(kind) for name, kind in STEPS.items()},
        "criteria": {name: criterion.about for name, criterion in CRITERIA.items()},
        "patterns": dict(PATTERNS),
        "losses": {name: _about(kind) for name, kind in LOSSES.items()},
        "schemes": {name: scheme.about for name, scheme in SCHEMES.items()},
        "metrics": {name: "higher is better" if row[1] else "lower is better" for name, row in METRICS.items()},
        "runtimes": dict(RUNTIMES),
    }
    if as_json:
        click.echo(json.dumps(known, indent=1))
        return
    width = max(len(name) for rows in known.values() for name in rows)
    for kind, rows in known.items():
        click.echo(click.style(kind, bold=True))
        for name, about in rows.items():
            click.echo(f"  {name:<{width}}  {about}")


def _name(recipe: Path) -> str:
    """What a recipe's results are called: as its file, or as the folder of a plain recipe.toml."""
    return recipe.stem if recipe.stem != "recipe" else recipe.resolve().parent.name


def _about(documented: Any) -> str:
    return (documented.__doc__ or "").strip().split("\n")[0]


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal, a line for each phase elsewhere; on stderr, so that stdout stays the result."""
    from rich import progress as rich
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    started, last = time.monotonic(), [""]
    bars: dict[str, Any] = {}
    columns = ("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn(),
               rich.TimeRemainingColumn(), rich.TextColumn("{task.fields[note]}"))  # fmt: skip
    with rich.Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def show(event: Event) -> None:
            name = escape(printable(f"{event.step}: {event.phase}"))  # rich reads [...] as markup
            note = escape(printable("  ".join(f"{key} {value:.4g}" for key, value in event.values.items())))
            if console.is_terminal:
                if name not in bars:
                    for bar in bars.values():
                        progress.update(bar, total=progress.tasks[bar].total or 1, refresh=True)
                        if not progress.tasks[bar].finished:
                            progress.update(bar, completed=progress.tasks[bar].total or 1)
                    bars[name] = progress.add_task(name, total=event.total, note=note)
                progress.update(bars[name], completed=event.current, total=event.total, note=note)
                return
            tenth = 10 * event.current // event.total if event.total else 0
            line = f"{name} {tenth * 10} %" if event.total else name
            if line != last[0]:
                last[0] = line
                console.print(f"{time.monotonic() - started:6.0f} s  {line}  {note}", highlight=False)

        yield show


def main() -> None:
    """Exit code 0 on success, 2 on the user's error (one line), 1 on ours."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        cli.main(args=arguments, prog_name="torchslim", standalone_mode=False)
        if distributed := sys.modules.get("torchslim.core.distributed"):
            distributed.leave()
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; run the same command again to go on", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the last resort, which says whose mistake it is
        from torchslim.errors import TorchslimError

        if debug:
            traceback.print_exc()
        if isinstance(error, TorchslimError):
            click.echo(f"error: {printable(str(error), lines=True)}", err=True)
            sys.exit(2)
        hint = "" if debug else "; run with --debug for the traceback"
        click.echo(f"internal error: {type(error).__name__}: {printable(str(error), lines=True)}{hint}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
