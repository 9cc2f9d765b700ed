"""Searches of a toy model from end to end: the front, resuming, sharing, what is done once, and what cannot be met."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support.searches import QUICK
from tests.support.toy import model, task
from torchslim.errors import RecipeError
from torchslim.tuning import make_space
from torchslim.tuning.trial import Effort, Lab, cut_short, data_share

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def document(change: str = "", by: str = "") -> dict[str, Any]:
    """The recipe, with one change."""
    assert change in QUICK
    return tomllib.loads(QUICK.replace(change, by))


def lasting(data: dict[str, Any]) -> Any:
    """What of a search's data does not depend on the clock."""
    trials = [{key: each[key] for key in each if key != "seconds"} for each in data["trials"]]
    kept = ("metric_drop", "size", "macs", "params")
    front = [
        {**each, "figures": {name: each["figures"][name] for name in kept}} for each in data["front"]
    ]  # fmt: skip
    return json.loads(json.dumps([trials, front, data["verdict"]]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> ts.SearchResult:
    """One search, which the tests look at."""
    return ts.search(model(), task(), document(), workdir=tmp_path_factory.mktemp("search") / "out")


def test_the_front_is_of_artifacts_with_recipes_that_run(found: ts.SearchResult) -> None:
    assert len(found.data["trials"]) == 4
    assert found.verdict.met
    assert found.best is not None
    for member in found.front:
        assert member.figures["size"] == sum(
            (member.folder / name).stat().st_size for name in ("model.onnx",)
        ) / 1e6  # fmt: skip
        recipe = tomllib.loads((member.folder / "recipe.toml").read_text())
        assert "budget" not in recipe
        space = make_space(document())
        assert [each["do"] for each in recipe["step"]] == [each["do"] for each in space.chosen(member.values)["step"]]
        ts.load(member.folder)(next(iter(task().val))[0])
    assert json.loads((found.folder / "search.json").read_text()) == json.loads(json.dumps(found.data))
    assert str(found)
    assert (found.folder / "report.html").read_text().startswith("<!doctype html>")


def test_the_front_has_no_member_that_another_dominates(found: ts.SearchResult) -> None:
    names = found.data["objectives"]
    for one in found.front:
        for other in found.front:
            assert not all(other.figures[name] < one.figures[name] for name in names)


def test_run_again_it_is_done_at_once(found: ts.SearchResult) -> None:
    again = ts.search(model(), task(), document(), workdir=found.folder)
    assert lasting(again.data) == lasting(found.data)
    assert all(each.result is None for each in again.front)  # nothing was run


def test_the_same_seed_gives_the_same_front(found: ts.SearchResult, tmp_path: Path) -> None:
    again = ts.search(model(), task(), document(), workdir=tmp_path / "out")
    assert lasting(again.data) == lasting(found.data)


def test_killed_in_a_trial_it_goes_on_as_undisturbed(found: ts.SearchResult, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(QUICK)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torchslim", "search", str(recipe), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if "search: trial 2" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (out / "search.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    assert "report.html" in done.stdout
    data = json.loads((out / "search.json").read_text())
    for row in data["trials"]:  # the one that was lost has given its number away
        row["number"] -= row["number"] > 2
    for row in data["front"]:
        row["trial"] -= row["trial"] > 2
    wanted, got = lasting(found.data), lasting(data)
    assert got[0] == wanted[0]
    assert [each["parameters"] for each in got[1]] == [each["parameters"] for each in wanted[1]]
    assert [each["figures"] for each in got[1]] == [each["figures"] for each in wanted[1]]


def test_a_folder_or_study_of_another_search_is_refused_before_any_work(found: ts.SearchResult, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="belongs to another recipe"):
        ts.search(model(), task(), document("0.6", "0.7"), workdir=found.folder)
    with pytest.raises(RecipeError, match="search of another recipe"):
        ts.search(model(), task(), document("0.6", "0.7"), workdir=found.folder, study="mine")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="files.*no search"):
        ts.search(model(), task(), document(), workdir=tmp_path)


def test_budgets_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="5 finalists.*4 trials"):
        ts.search(model(), task(), document("finalists = 1", "finalists = 5"), workdir=tmp_path / "a")
    with pytest.raises(RecipeError, match="'inductor'.*no file"):
        ts.search(model(), task(), document("threads = 1", 'runtime = "inductor"'), workdir=tmp_path / "b")
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_met_ends_with_the_nearest_and_what_binds(tmp_path: Path) -> None:
    change = "metric_drop = 90.0"
    given = document(change, "metric_drop = 90.0\nparams = 10.0\nsize_mb = 0.001")
    given["budget"] |= {"trials": 2}
    result = ts.search(model(), task(), given, workdir=tmp_path / "out")
    assert not result.verdict.met
    assert result.best is not None
    assert not result.best.within
    assert set(result.verdict.binding) == {"params", "size"}
    assert "no measured artifact" in str(result)
    assert all(row["state"] == "stopped" for row in result.data["trials"])  # no training makes it smaller


def test_a_space_of_two_runtimes_is_searched_whole_and_each_recipe_once(tmp_path: Path) -> None:
    given = document()
    given["runtime"] = {"search": ["onnxruntime", "eager"]}
    given["step"] = [{"do": "quantize", "scheme": {"search": ["int8", "int8-weights"]}}]
    given["budget"] |= {"trials": 40, "peak_memory_mb": 4000.0, "finalists": 1}
    found = ts.search(model(), task(), given, workdir=tmp_path / "out")
    tried = [(row["parameters"]["runtime"], row["parameters"]["1-quantize.scheme"]) for row in found.data["trials"]]
    assert sorted(tried) == sorted(
        (runtime, scheme) for runtime in ("onnxruntime", "eager") for scheme in ("int8", "int8-weights")
    )
    assert all(row["figures"]["peak_memory"] < 4000 for row in found.data["trials"])
    assert found.best is not None
    recipe = tomllib.loads((found.best.folder / "recipe.toml").read_text())
    assert recipe["runtime"] == found.best.values["runtime"]


def test_what_trains_nothing_is_measured_beside_the_finalists(tmp_path: Path) -> None:
    given = document()
    given["step"][1]["skip"] = {"search": [True, False]}
    given["budget"] |= {"trials": 5}
    found = ts.search(model(), task(), given, workdir=tmp_path / "out")
    whole = {row["number"]: row for row in found.data["trials"] if row["stage"] == "whole"}
    assert {row["parameters"]["2-distill.skip"] for row in whole.values()} == {True}
    front = {number for number in whole if (tmp_path / "out" / "front" / f"{number:03d}").exists()}
    assert front
    trained = [each for each in (tmp_path / "out" / "front").iterdir() if int(each.name) not in whole]
    assert len(trained) == 1  # of one finalist
    for member in found.front:
        if member.trial in whole:  # its trial knew what it would be
            assert member.figures["metric_drop"] == pytest.approx(whole[member.trial]["figures"]["metric_drop"])
            assert member.figures["size"] == whole[member.trial]["figures"]["size"]


def lab(folder: Path, **options: Any) -> Lab:
    """Without a search around it."""
    return Lab(
        model=model(), task=task(), teacher=None, budget=ts.Budget(minimize=("metric_drop", "params")), folder=folder,
        example_inputs=(next(iter(task().val))[0][:4],), seed=0, **options,
    )  # fmt: skip


def test_steps_that_candidates_share_are_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = make_space(document())
    taken: list[str] = []
    for kind in (ts.Prune, ts.Distill, ts.Quantize):
        call = kind.__call__

        def counted(self: Any, *args: Any, _call: Any = call) -> Any:
            taken.append(type(self).__name__)
            return _call(self, *args)

        monkeypatch.setattr(kind, "__call__", counted)
    here = lab(tmp_path)
    values = {"1-prune.skip": False, "1-prune.sparsity": 0.4}
    cheap, short = here.efforts()
    first = here.attempt(space.recipe({**values, "3-quantize.scheme": "int8"}), short)
    assert taken == ["Prune", "Distill", "Quantize"]
    here.attempt(space.recipe({**values, "3-quantize.scheme": "int8-weights"}), short)
    here.attempt(space.recipe({**values, "3-quantize.scheme": "int8"}), cheap)
    assert taken[3:] == ["Quantize", "Quantize"]  # of both, and of the one that is not trained
    again = lab(tmp_path).attempt(space.recipe({**values, "3-quantize.scheme": "int8"}), short)
    assert taken[5:] == ["Quantize"]
    assert again == first


def test_what_is_cut_short() -> None:
    cheap, short = Effort(name="cheap", training=0.0, data=0.25), Effort(name="short", training=0.3, data=1.0)
    teach = ts.Distill(epochs=10)
    assert cut_short(teach, cheap) is None
    assert cut_short(teach, short).epochs == 3
    pruned = ts.Prune(pattern="channel", sparsity=0.5, schedule="iterative", train=teach, sparsify="group-lasso")
    assert cut_short(pruned, cheap) == ts.Prune(pattern="channel", sparsity=0.5)
    assert cut_short(pruned, short).train.epochs == 3
    trained = ts.Quantize("int8", mode="qat", train=teach, learned_step=True)
    assert cut_short(trained, cheap) == ts.Quantize("int8")
    assert cut_short(trained, short).train.epochs == 3
    assert cut_short(ts.Quantize("int8", mode="qat"), short).train.epochs == 1
    student = ts.Distill(epochs=4, student=model())
    assert cut_short(student, cheap).initial_model(model(), 0) is not student.student
    assert data_share(ts.Distill(epochs=2), short) == pytest.approx(0.6)
    assert data_share(ts.Distill(epochs=10), short) == pytest.approx(1.0)


def test_trials_that_all_fail_end_the_search(tmp_path: Path) -> None:
    broken = document('pattern = "channel"', 'pattern = "channel"\nexclude = ["*"]')
    broken["step"][0]["skip"] = False
    broken["step"][0]["sparsity"] = {"search": [0.1, 0.6]}
    with pytest.raises(RecipeError, match="first 3 trials failed"):
        ts.search(model(), task(), broken, workdir=tmp_path / "out")


def test_processes_of_one_training_are_one_worker(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = QUICK.replace("skip = { search = [true, false] }", "").replace("{ search = [0.1, 0.6] }", "0.3")
    recipe.write_text(text)  # two recipes in all, so that the other trials are repeats, of which all must know
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "torchslim",
    ]
    done = subprocess.run(
        [*command, "search", str(recipe), "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [row["state"] for row in data["trials"]] == ["candidate"] * 2
    assert len(data["front"]) == 1
    assert done.stdout.count("report.html") == 1


class Averaging(nn.Module):
    """Series (batch, steps, 4) of any length -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(x)).mean(1))


def test_finalists_take_the_sizes_that_trials_take(tmp_path: Path) -> None:
    """Finalists had the sizes of the first batch alone. Costs 5 s."""
    torch.manual_seed(0)
    batches = [(torch.randn(8, length, 4), torch.arange(8) % 3) for length in (6, 9, 7)]
    data = ts.Task(train=batches[::-1], val=batches, metric="accuracy")
    recipe = tomllib.loads(
        'model = "a:b"\ntask = "a:c"\n[budget]\nmetric_drop = 90.0\ntrials = 1\nfinalists = 1\n'
        '[[step]]\ndo = "quantize"\nscheme = { search = ["int8", "int8-weights"] }'
    )
    best = ts.search(Averaging().eval(), data, recipe, workdir=tmp_path / "out").best
    assert best is not None
    deployed = ts.load(best.folder)
    assert deployed.spec.sizes == [[None, None, 4]]
    assert deployed(torch.randn(2, 13, 4)).shape == (2, 3)
