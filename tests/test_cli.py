"""The command line, in this process: exit codes, one clear line for a mistake, JSON on demand."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import torchslim as ts
from tests.support import rehearsals, toy
from tests.support.varying import VARYING
from torchslim.core.reason import Reason
from torchslim.pipeline.forecast import TimeLeft
from torchslim.pipeline.recipe import STEPS

RECIPE = """
model = "tests.support.toy:model"
task = "tests.support.toy:task"
runtime = "eager"
threads = 1

[[step]]
do = "prune"
sparsity = 0.5

[[step]]
do = "finetune"
epochs = 1
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "out"
    return ts.save(ts.deploy(toy.model(), (toy.images(2, 0)[0],), runtime="eager", threads=1), folder)


@pytest.mark.parametrize(
    "command", ["run", "check", "inspect", "kernels", "sensitivity", "latency", "bench", "report", "list"]
)
def test_help_shows_an_example(call: Any, command: str) -> None:
    done = call(command, "--help")
    assert done.code == 0
    assert f"torchslim {command}" in done.out


@pytest.mark.slow
def test_run_makes_the_artifact_and_says_where_the_report_is(call: Any, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(RECIPE)
    done = call("run", recipe, "--out", out)
    assert done.code == 0, done.err
    assert f"report: {out / 'report.html'}" in done.out
    assert "finetune" in done.out
    assert (out / "report.html").is_file()
    ts.load(out)
    again = call("run", recipe, "--out", out, "--json")
    assert again.code == 0
    assert json.loads(again.out)["recipe"]["model"] == "tests.support.toy:model"
    assert "finetune: resumed" in again.err

    recipe.write_text(RECIPE.replace("0.5", "0.6"))
    refused = call("run", recipe, "--out", out)
    assert refused.code == 2
    assert "run of another recipe" in refused.err
    assert "Traceback" not in refused.err
    assert len(refused.err.strip().splitlines()) == 1

    (out / "report.html").unlink()
    reported = call("report", out)
    assert reported.code == 0
    assert (out / "report.html").is_file()


def test_check_accepts_and_refuses_without_running(call: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    assert "prune -> finetune -> eager: ok" in call("check", recipe).out
    assert [step["do"] for step in json.loads(call("check", recipe, "--json").out)] == [
        "torchslim.prune.step:Prune", "torchslim.training.finetune:Finetune",
    ]  # fmt: skip
    recipe.write_text(RECIPE.replace("sparsity", "sparsty"))
    refused = call("check", recipe)
    assert refused.code == 2
    assert "did you mean 'sparsity'" in refused.err
    recipe.write_text(RECIPE.replace("tests.support.toy:model", "tests.nothing:model"))
    assert "cannot be imported" in call("check", recipe).err


@pytest.mark.slow
def test_bench_compares_saved_artifacts(call: Any, artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    rows = json.loads(call("bench", artifact, copy, "--rounds", 5, "--json").out)
    assert [row["artifact"] for row in rows] == [str(artifact), str(copy)]
    assert rows[0]["speedup"] == {"median": 1.0, "p10": 1.0, "p90": 1.0, "verdict": "no difference"}
    assert rows[1]["latency_ms"]["rounds"] == 5
    assert str(copy) in call("bench", artifact, copy, "--rounds", 5, "--batch", 3).out
    assert call("bench", tmp_path).code == 2


def test_bench_times_the_median_and_the_largest_size(call: Any, artifact: Path, tmp_path: Path) -> None:
    case = VARYING["audio"]
    ts.save(ts.deploy(case.model(), case.examples(), runtime="eager", threads=1), tmp_path / "varying")
    (row,) = json.loads(call("bench", tmp_path / "varying", "--rounds", 3, "--json").out)
    assert row["largest"]["latency_ms"]["rounds"] == row["latency_ms"]["rounds"] == 3
    shown = call("bench", tmp_path / "varying", "--rounds", 3).out
    assert "median size" in shown
    assert "largest size" in shown
    assert "size" not in call("bench", artifact, "--rounds", 3).out


@pytest.mark.slow
def test_inspect_shows_what_may_be_pruned_and_why_the_rest_stays(call: Any) -> None:
    done = call("inspect", "tests.support.toy:model", "--input", "1x1x8x8")
    assert done.code == 0, done.err
    assert "conv1.weight[0], bn1.weight[0], bn1.bias[0], conv2.weight[0] and 5 more" in done.out
    assert Reason.OUTPUT in done.out
    assert "kernel's extent" not in done.out
    assert "kernel's extent" in call("inspect", "tests.support.toy:model", "--input", "1x1x8x8", "--all").out
    data = json.loads(
        call("inspect", "tests.support.models:Encoder", "--input", "tokens=2x4:int64", "--heads", "whole", "--json").out
    )
    widths = {group["members"][-1]: group["width"] for group in data["groups"]}
    assert widths["encoder.layers.0.self_attn.out_proj.weight[1]"] == 2
    assert call("inspect", "tests.prune.test_inspection:with_inputs").code == 0
    refused = call("inspect", "tests.support.toy:model")
    assert refused.code == 2
    assert "one --input" in refused.err


@pytest.mark.parametrize("arguments", [["r.toml", "--sensitivity"], ["out"]])
def test_what_inspect_did_before_names_the_command_of_today(arguments: list[str], call: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "artifact.json").write_text("{}")
    refused = call("inspect", tmp_path / arguments[0], *arguments[1:])
    assert refused.code == 2
    assert f"torchslim {'sensitivity' if len(arguments) > 1 else 'kernels'} {tmp_path}" in refused.err


def test_list_names_all_that_is_registered(call: Any) -> None:
    known = json.loads(call("list", "--json").out)
    assert set(known["steps"]) == set(STEPS)
    for rows in known.values():
        assert all(about for about in rows.values())
    assert "quantize" in call("list").out


def test_usage_errors_are_the_users_and_bugs_are_ours(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("run").code == 2
    assert call("nonsense").code == 2
    monkeypatch.setattr("torchslim.pipeline.document.load_document", lambda path: 1 / 0)
    broken = call("check", "x.toml")
    assert broken.code == 1
    assert "internal error: ZeroDivisionError" in broken.err
    assert "--debug" in broken.err
    assert "Traceback" in call("--debug", "check", "x.toml").err


def test_the_current_folder_is_importable(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_module.py").write_text("from tests.support.toy import model, task\n")
    (tmp_path / "r.toml").write_text(RECIPE.replace("tests.support.toy", "my_own_module"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry != os.fspath(tmp_path)])
    assert call("check", "r.toml").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "text", "series", "detection"])
def test_a_starter_is_complete_and_its_model_is_good(
    kind: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs 3 s each, the detector 8: the starter trains its model."""
    folder = tmp_path / "mine"
    assert call("init", folder, "--from", kind).code == 0
    assert call("init", folder, "--from", kind).code == 2, "nothing is overwritten"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "task", raising=False)
    assert call("check", "recipe.toml").code == 0
    import task  # type: ignore[import-not-found]

    found = task.task()
    value = found.evaluate(task.model(), "test")
    assert value > (80 if kind == "detection" else 90) if found.as_metric().higher_is_better else value < 10
    monkeypatch.delitem(sys.modules, "task")


@pytest.mark.slow
def test_the_demo_shows_int8_alone_before_the_whole_recipe(call: Any, tmp_path: Path) -> None:
    """Costs 5 s."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("eager", "onnxruntime"))
    done = call("demo", recipe, "--out", tmp_path / "out")
    assert done.code == 0
    first, whole = (json.loads((tmp_path / "out" / name / "run.json").read_text()) for name in ("int8", ""))
    assert [row["name"] for row in first["rows"]] == ["baseline", "quantize", "artifact"]
    assert [row["name"] for row in whole["rows"]][1:] == ["prune", "finetune", "artifact"]
    assert done.out.index("int8/report.html") < done.out.index("out/report.html")
    assert "of training left" in done.err
    assert call("demo", recipe, "--out", tmp_path / "out").err.count("resumed") == 3


def test_the_time_left_is_at_the_pace_of_the_trainings_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("torchslim.pipeline.forecast.time.monotonic", lambda: now[0])
    train = ts.Finetune(epochs=2)
    steps = [ts.Prune(sparsity=0.5, schedule="iterative", rounds=2, train=train), ts.Quantize("int8"),
             ts.Distill(epochs=4)]  # fmt: skip
    left = TimeLeft(steps)

    def after(seconds: float, step: str, phase: str, current: int) -> float | None:
        now[0] += seconds
        return left.after(ts.Event(step=step, phase=phase, current=current, total=10, values={"epoch": 1}))

    assert left.after(ts.Event(step="prune", phase="start")) is None
    assert after(3, "prune", "prune-1", 0) is None, "nothing has run yet"
    assert after(5, "prune", "prune-1", 5) == pytest.approx(5 * 7)
    assert after(5, "prune", "prune-1", 10) == pytest.approx(5 * 6)
    assert after(5, "prune", "prune-2", 5) == pytest.approx(5 * 5)
    assert after(25, "distill", "train", 0) == pytest.approx(40 / 4 * 4)
    assert after(0, "stranger", "train", 5) is None
    assert after(10, "distill", "train", 10) == 0


def test_the_time_left_leaves_out_epochs_that_early_stopping_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("torchslim.pipeline.forecast.time.monotonic", lambda: now[0])
    left = TimeLeft([ts.Finetune(epochs=8, patience=1), ts.Distill(epochs=4)])
    left.after(ts.Event(step="finetune", phase="train", current=0, total=80, values={"epoch": 1}))
    now[0] = 20
    done = ts.Event(step="finetune", phase="train", current=20, total=20, values={"epoch": 2, "last_epoch": 2})
    assert left.after(done) == pytest.approx(4 * 10), "four epochs at the pace of two in 20 s"


@pytest.mark.slow
def test_check_rehearses_where_asked_and_run_by_itself(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs 6 s."""
    rehearsals.restore(monkeypatch)
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    plain, rehearsed = call("check", recipe), call("check", recipe, "--rehearse")
    assert plain.out == rehearsed.out
    assert "forecast" not in plain.err
    assert "memory at the peak" in rehearsed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.toml"]
    outputs = {}
    for name, options in (("with", []), ("without", ["--no-rehearse"])):
        done = call("run", recipe, "--out", tmp_path / name, *options)
        assert done.code == 0
        outputs[name] = done.err
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert ("forecast" in run) is ("time (forecast)" in done.out) is (name == "with")
    assert (
        outputs["with"].index("rehearsal")
        < outputs["with"].index("memory at the peak")
        < outputs["with"].index("baseline: deploy")
    )
    assert "rehearsal" not in outputs["without"]


@pytest.mark.slow
def test_a_rehearsal_that_fails_is_one_line_with_the_step_and_the_line_of_code(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_task.py").write_text(
        "from dataclasses import replace\nfrom tests.support import toy\n\n\n"
        "def loss(outputs, batch):\n    return outputs['loss']\n\n\n"
        "def task():\n    return replace(toy.task(), loss=loss)\n"
    )
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("tests.support.toy:task", "late_task:task"))
    done = call("check", recipe, "--rehearse")
    assert done.code == 2
    assert "step 2 ('finetune')" in done.err
    assert "late_task.py, line 6" in done.err
