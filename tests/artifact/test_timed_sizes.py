"""Where sizes vary, the median-size and the largest example are timed, saved and reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchslim as ts
from tests.support.varying import VARYING, audio, text
from torchslim.artifact.latency import resized, shared_examples
from torchslim.artifact.peak_memory import peak_memory
from torchslim.errors import ArtifactError
from torchslim.report import load_run, render, table

CASE = VARYING["text"]


def shapes(leaves: Any) -> list[tuple[int, ...]] | None:
    return None if leaves is None else [tuple(leaf.shape) for leaf in leaves]


@settings(max_examples=5)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=6))
def test_the_median_and_the_largest_of_the_examples_are_timed(lengths: list[int]) -> None:
    model, examples = VARYING["audio"].model(), [audio(3, length) for length in lengths]
    deployed = ts.deploy(model, examples, runtime="eager", threads=1)
    distinct = sorted({4 * length for length in lengths})
    assert shapes(resized(deployed)) == [(1, 1, distinct[(len(distinct) - 1) // 2])]
    if len(distinct) == 1:
        assert deployed.largest is None
    else:
        assert shapes(resized(deployed, inputs=deployed.largest)) == [(1, 1, distinct[-1])]


def test_models_that_share_a_size_are_timed_at_it() -> None:
    examples = [text(2, length) for length in (5, 9, 7)]
    free = ts.deploy(CASE.model(), examples, runtime="eager", threads=1)
    fixed = ts.deploy(CASE.model(), examples[0], runtime="eager", threads=1)
    other = ts.deploy(CASE.model(), examples[1], runtime="eager", threads=1)
    assert [shapes(leaves) for leaves in shared_examples([free, free])] == [[(2, 7)] * 2, [(2, 9)] * 2]
    assert [shapes(leaves) for leaves in shared_examples([free, fixed])] == [[(2, 5)] * 2, None]
    assert shared_examples([free, fixed, other]) == (None, None)


def test_an_artifact_holds_both_and_its_script_times_both(tmp_path: Path) -> None:
    """Costs 2 s: a process that runs bench.py."""
    deployed = ts.deploy(CASE.model(), CASE.examples(), threads=1)
    ts.save(deployed, tmp_path)
    loaded = ts.load(tmp_path)
    for one, other in ((deployed.example, loaded.example), (deployed.largest, loaded.largest)):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    done = subprocess.run(
        [sys.executable, tmp_path / "bench.py", "--rounds", "3"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": ""},
    )
    timed = json.loads(done.stdout)
    for record, length in ((timed, 7), (timed["largest"], 9)):
        assert record["inputs"] == [[1, length]] * 2
        assert record["largest_difference_to_recorded_outputs"] == 0
        assert 0 < record["latency_ms"]["p10"] <= record["latency_ms"]["median"] <= record["latency_ms"]["p90"]


@pytest.mark.slow
def test_peak_memory_is_that_of_the_largest_inputs() -> None:
    """Costs 10 s: two processes."""
    one, many = text(1, 8), text(1, 1024)
    model = type(CASE.model())(longest=1024).eval()
    small = peak_memory(ts.deploy(model, one, threads=1))
    assert peak_memory(ts.deploy(model, [one, many], threads=1)) > small + 2**20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    batches = [{**text(2, length), "labels": torch.tensor([0, 1])} for length in (5, 9, 7)]
    task = ts.Task(train=batches, val=batches, metric="accuracy")
    folder = tmp_path_factory.mktemp("run")
    steps = [ts.Prune(sparsity=0.5)]
    ts.compress(CASE.model(), task, steps, runtime="onnxruntime", threads=1, workdir=folder)
    resumed = ts.compress(CASE.model(), task, steps, runtime="onnxruntime", threads=1, workdir=folder)
    assert resumed.run["sizes"] == load_run(folder)["sizes"]
    return load_run(folder)


def test_a_run_times_and_names_both_sizes(run: dict[str, Any]) -> None:
    """Costs 4 s: a run of one step, and its resuming."""
    of_length = "input_ids (1, {0}), attention_mask (1, {0})".format
    assert run["sizes"] == {"median": of_length(7), "largest": of_length(9)}
    for row in run["rows"]:
        assert set(row["latency_largest_ms"]) == {"onnxruntime", "eager"}
        assert row["speedup_largest"]["over_baseline"]["value"] > 0
    for shown in (table(run), render(run)):
        assert of_length(7) in shown
        assert of_length(9) in shown
        assert "largest size" in shown


def test_a_run_of_one_size_has_neither_the_figures_nor_the_columns(run: dict[str, Any], tmp_path: Path) -> None:
    old = {key: value for key, value in run.items() if key != "sizes"}
    old["rows"] = [
        {key: value for key, value in row.items() if key not in ("latency_largest_ms", "speedup_largest")}
        for row in run["rows"]
    ]
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert "largest" not in table(load_run(tmp_path))
    damaged = {**run, "rows": old["rows"]}  # sizes are named, the figures are missing
    (tmp_path / "run.json").write_text(json.dumps(damaged))
    with pytest.raises(ArtifactError, match=r"rows\[0\].*latency_largest_ms"):
        load_run(tmp_path)
