"""The gallery, job by job: python -m benchmarks.jobs [--only JOB] [--max-minutes M]

Each job of examples/ runs its recipe as it is. Its float model is compared with the artifact: the metric on test,
bytes, and the time of one sample on the same runtime with one thread, in interleaved rounds. The time is that of the
processor, so that other programs on the machine do not count. Rows are appended to benchmarks/jobs.jsonl, so that an
interrupted benchmark continues; benchmarks/jobs.md is written from them. Baselines are trained before the clock starts.
`python -m examples.gallery` downloads the data.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import torchslim as ts
from benchmarks.jobs_page import latest, page
from benchmarks.rows import Row, append, load, machine_named, version
from examples.gallery import JOBS, PackageMissing
from torchslim.artifact.assembled import AnyDeployed, DeployedParts
from torchslim.artifact.latency import Timings, resized
from torchslim.core.batches import batch_size
from torchslim.errors import RecipeError
from torchslim.pipeline.recipe import Recipe, load_recipe
from torchslim.report.numbers import value_of

ROWS = Path(__file__).with_suffix(".jsonl")
EXAMPLES = Path(__file__).parents[1] / "examples"
ROUNDS, ROUND_SECONDS = 60, 0.02
NOT_THE_USERS = ("tiny.py", "baseline.py")  # for tests; training, which a user has done before


def code_lines(folder: Path) -> int:
    """Lines of a job's Python code, without blank lines, comments and docstrings."""
    return sum(_code_lines(path) for path in folder.glob("*.py") if path.name not in NOT_THE_USERS)


def _code_lines(path: Path) -> int:
    text = path.read_text()
    described: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            described.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in no_code]
    lines = {line for token in tokens[1:] for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - described)


def measured(run: Mapping[str, Any]) -> Row:
    """Figures of a run, from the content of its run.json."""
    first, last = run["rows"][0], run["rows"][-1]
    row: Row = {}
    for name, figures in (("float", first), ("artifact", last)):
        row[name] = {
            "val": value_of(figures["metric"]["val"]),
            "test": value_of(figures["metric"]["test"]),
            "bytes": value_of(figures["size_bytes"]),
        }
    return row | {
        "metric": {key: run["metric"].get(key) for key in ("name", "unit", "higher_is_better")},
        "runtime": run["target"]["runtime"],
        "steps": [str(step["name"]) for step in run["rows"][1:-1]],
    }


def calls(before: AnyDeployed, after: AnyDeployed) -> tuple[dict[str, Callable[[], object]], int]:
    """Functions that run the float model and the artifact, and the samples of a call.

    One sample, or, of a model with deployed parts, the first batch of the task: only the code of the model knows how a
    call with fewer samples looks.
    """
    if isinstance(before, DeployedParts) and isinstance(after, DeployedParts):
        before = DeployedParts(before.model, before.parts, after.example)  # a loaded model has no example
        return {"float": before.caller(), "artifact": after.caller()}, batch_size(after.example)
    pair = {"float": before, "artifact": after}
    return {name: partial(deployed.run, resized(deployed)) for name, deployed in pair.items()}, 1


def timed(candidates: Mapping[str, Callable[[], object]], samples: int = 1, rounds: int = ROUNDS) -> Row:
    """Milliseconds of the processor for one sample, and how many times faster the artifact is, from paired rounds."""
    repeats, taken = {}, {name: [] for name in candidates}
    for name, run in candidates.items():
        run()
        repeats[name] = max(1, round(ROUND_SECONDS / min(_processor_time(run, 1) for _ in range(5))))
    for _ in range(rounds):
        for name, run in candidates.items():
            taken[name].append(1e3 * _processor_time(run, repeats[name]) / samples)
    timings = Timings(taken)
    speedup = timings.speedup("artifact", "float")
    return {
        "latency_ms": {name: timings.latency(name).value for name in candidates},
        "speedup": {"value": speedup.value, "low": speedup.p10, "high": speedup.p90, "verdict": speedup.verdict},
    }


def _processor_time(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the processor for one call, over all threads of this process."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return max(time.process_time() - start, 1e-9) / repeats


def measure(job: str) -> Row:
    """The row of a job; one that fails has the reason in it."""
    recipe = load_recipe(EXAMPLES / job / "recipe.toml")
    row: Row = {"job": job, "lines": code_lines(EXAMPLES / job), "reason": ""}
    try:
        model, task, _ = recipe.load()
    except (PackageMissing, RecipeError) as error:
        return row | {"reason": str(error)}
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = ts.compress(
                model,
                task,
                recipe.steps,
                runtime=recipe.target.runtime,
                threads=1,
                part=recipe.part,
                dynamic_shapes=recipe.dynamic_shapes,
                seed=recipe.seed,
                workdir=folder,
            )
            row |= measured(result.run)
            row["minutes"] = (time.perf_counter() - start) / 60
            factory = (lambda: model) if recipe.part else None
            before = ts.load(Path(folder) / "00-baseline", factory, runtime=recipe.target.runtime, threads=1)
            row |= timed(*calls(before, result.deployed))
    except ts.TorchslimError as error:
        return row | {"reason": f"{type(error).__name__}: {error}"}
    row["suggested"] = suggested(recipe, model, task)
    return row


def suggested(recipe: Recipe, model: torch.nn.Module, task: ts.Task) -> list[str]:
    """The reasons of the recipe that `suggest` gives for a job."""
    return list(ts.suggest(model, task, runtime=recipe.target.runtime, part=recipe.part).reasons)


def suggested_again(row: Row, now: str) -> Row:
    """A measured row with the suggestion of the present source."""
    recipe = load_recipe(EXAMPLES / row["job"] / "recipe.toml")
    model, task, _ = recipe.load()
    return row | {"suggested": suggested(recipe, model, task), "suggested_version": now}


def missing(rows: Iterable[Row], jobs: Iterable[str], now: str, *, fresh: bool) -> list[str]:
    """Jobs without a row that counts; with `fresh`, also those whose row is of another source."""
    have = {row["job"]: row for row in rows if not row["reason"]}
    return [job for job in jobs if job not in have or (fresh and have[job]["version"] != now)]


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*JOBS], help="one job, whether it was measured before or not")
    parser.add_argument("--suggest", action="store_true", help="of measured jobs only derive the suggestion again")
    parser.add_argument("--fresh", action="store_true", help="run what was measured on other source again")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="then nothing more is started")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the JSONL to go on with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stop = time.monotonic() + 60 * arguments.max_minutes
    now = version("ours")  # of the source that is loaded, whatever is edited meanwhile
    measured_before = latest(load(arguments.rows))
    todo = missing(load(arguments.rows), JOBS, now, fresh=arguments.fresh)
    if arguments.suggest:
        todo = [job for job in JOBS if job in measured_before]
    if arguments.only:
        todo = [arguments.only]
    for number, job in enumerate(todo, 1):
        if time.monotonic() > stop:
            break
        again = arguments.suggest and job in measured_before
        row = suggested_again(measured_before[job], now) if again else measure(job) | {"version": now}
        row = {"machine": machine_named()} | row
        append(row, arguments.rows)
        print(f"{number}/{len(todo)} {job}: {row['reason'] or row['artifact']}", flush=True)
    target = arguments.rows.with_suffix(".md")
    target.write_text(page(load(arguments.rows), torch.__version__.partition("+")[0]))
    print(target)


if __name__ == "__main__":
    main()
