"""Mutated files of working folders: a run's record, a stage's, and the recipe that a folder belongs to."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from torch import nn

from tests.mutations.base import Kind, garbled, mutated
from torchslim.pipeline.stages import COMMIT, keep, kept
from torchslim.pipeline.work_folder import RECIPE, claim
from torchslim.report import load_run, render, table
from torchslim.report.findings import summary

KEY = "the key of a run"


def number(value: float, unit: str, **more: Any) -> dict[str, Any]:
    return {"value": value, "unit": unit, "repeats": 1, **more}


def ratio(value: float) -> dict[str, Any]:
    return number(value, "x", low=value, high=value, machine="this", verdict="faster")


def stage_row(name: str) -> dict[str, Any]:
    return {
        "name": name, "kind": "step", "metric": {"val": number(90.0, "%"), "test": {"not_measured": "no test batches"}},
        "parameters": number(1000, "count"), "nonzero": number(500, "count"), "macs": number(10**6, "MACs per sample"),
        "size_bytes": number(4000, "bytes"), "seconds": number(1.5, "s", machine="this"),
        "layers": [{"version": 1, "layer": "conv", "action": "pruned", "reason": "", "sparsity": 0.5, "weight_bits": None,
                    "activation_bits": None, "sqnr_db": None, "kernel": "", "integer": None}],
        "warnings": ["a warning"], "history": [{"epoch": 1.0, "loss_label": 0.5}],
        "evidence": {"latency": [{"ceiling": 0.5, "programs": 3, "elsewhere": "", "best": 1,
                                  "rounds": [{"target": 0.5, "predicted": 0.5, "measured": None}]}]},
    }  # fmt: skip


def run_row(name: str) -> dict[str, Any]:
    ratios = {"over_baseline": ratio(2.0), "over_previous": ratio(1.0)}
    return stage_row(name) | {
        "latency_ms": {"eager": number(1.0, "ms", low=0.9, high=1.1, machine="this")}, "speedup": ratios,
        "shrink": {"over_baseline": number(2.0, "x"), "over_previous": {"not_measured": "no file"}},
    }  # fmt: skip


RECIPE_OF_RUN = {
    "model": "tests.support.toy:model", "task": "tests.support.toy:task", "seed": 0, "target": {"runtime": "eager", "threads": 1},
    "steps": [{"do": "torchslim.prune.step:Prune", "sparsity": 0.5, "train": None}],
}  # fmt: skip
RUN = {
    "format": 1, "torchslim": "0.1.0", "recipe": RECIPE_OF_RUN,
    "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True}, "target": {"runtime": "eager", "threads": 1},
    "selected_on": "val", "reported_on": "val (selected on val)", "batch": 1,
    "machines": {"this": {"processor": "a CPU", "cores": 2, "versions": {"torch": "2.11"}}},
    "rows": [run_row("baseline") | {"kind": "baseline"}, run_row("prune"), run_row("artifact") | {"kind": "artifact"}],
}  # fmt: skip


def encoded(document: Any) -> bytes:
    """As JSON, with what JSON has no word for: NaN, and lists without end."""
    try:
        return json.dumps(document, default=str).encode()
    except RecursionError:
        return b"[" * 200_000


@cache
def folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="torchslim-mutations-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def read_run(data: bytes) -> None:
    """As `torchslim report` does."""
    path = folder() / "run.json"
    path.write_bytes(data)
    run = load_run(path)
    page, told = render(run), table(run) + summary(run)
    if "<script>alert(1)" in page or "\x1b" in page + told:
        raise AssertionError("a text of the run is not escaped")


@cache
def stage() -> tuple[Path, bytes]:
    place = folder() / "01-prune"
    keep(place, KEY, module=nn.Linear(2, 2), masks={}, row=stage_row("prune"))
    return place, (place / COMMIT).read_bytes()


def take_up_stage(data: bytes) -> object:
    """As a run does that goes on: what is not what was written is never taken up."""
    place, written = stage()
    (place / COMMIT).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = kept(place, KEY)
    try:
        same = json.loads(data) == json.loads(written)
    except (ValueError, RecursionError):
        same = False
    if found is not None and not same:
        raise AssertionError("an edited stage.json was taken up")
    return found


def claim_folder(data: bytes) -> None:
    """As a run does that begins."""
    (folder() / RECIPE).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        claim(folder(), RECIPE_OF_RUN, overwrite=False)


def texts(document: Callable[[], Any]) -> st.SearchStrategy[bytes]:
    """Files whose values are changed, or whose text is."""

    @st.composite
    def files(draw: st.DrawFn) -> bytes:
        if draw(st.booleans()):
            return draw(garbled(st.just(json.dumps(document())))).encode("utf-8", "surrogatepass")
        return encoded(draw(mutated([document()])))

    return files()


KINDS_OF_FOLDERS = (
    Kind(name="run.json", group="folders", examples=texts(lambda: RUN), attempt=read_run),
    Kind(name="stage.json", group="folders", examples=texts(lambda: json.loads(stage()[1])), attempt=take_up_stage),
    Kind(name="recipe.json", group="folders", examples=texts(lambda: RECIPE_OF_RUN), attempt=claim_folder),
)
