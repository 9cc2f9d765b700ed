"""A solved search of a toy model from end to end: its recipes, its explanations, resuming, and bounds out of reach."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import torchslim as ts
from tests.support.searches import QUICK
from tests.support.toy import model, task
from torchslim.allocation.solver import Infeasible
from torchslim.errors import RecipeError, TaskError
from torchslim.report import render_search
from torchslim.tuning.storage import open_storage

pytestmark = pytest.mark.slow


def document(**budget: Any) -> dict[str, Any]:
    """The quick recipe, solved for MACs, which need no clock."""
    recipe = tomllib.loads(QUICK)
    limits = {"metric_drop": 90.0, "minimize": ["metric_drop", "macs"], "trials": 3, "epochs": 4, "method": "solve"}
    return {**recipe, "budget": {**limits, **budget}}


def lasting(found: ts.SearchResult) -> Any:
    """What does not depend on the clock."""
    trials = [{key: each[key] for key in each if key != "seconds"} for each in found.data["trials"]]
    front = [
        (each["trial"], each["parameters"], each["figures"]["macs"], each["explained"]) for each in found.data["front"]
    ]
    return json.loads(json.dumps([trials, front]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> ts.SearchResult:
    return ts.search(model(), task(), document(), workdir=tmp_path_factory.mktemp("solve") / "out", rehearse=False)


def test_the_front_has_ordinary_recipes_that_cost_less_and_less(found: ts.SearchResult) -> None:
    assert len(found.data["trials"]) == 2  # two trainings of two epochs
    macs = sorted(member.figures["macs"] for member in found.front)
    assert macs[0] < found.data["baseline"]["figures"]["macs"]["value"]
    for member in found.front:
        recipe = tomllib.loads((member.folder / "recipe.toml").read_text())
        assert "budget" not in recipe
        assert {step["do"] for step in recipe["step"]} <= {"prune", "distill", "quantize"}
        ts.load(member.folder)(next(iter(task().val))[0])


def test_predicted_counts_are_the_measured_ones(found: ts.SearchResult) -> None:
    for member in found.data["front"]:
        predicted, measured = member["explained"]["predicted"]["macs"], member["figures"]["macs"]["value"]
        assert predicted == pytest.approx(measured, rel=0.02)


def test_it_explains_itself(found: ts.SearchResult) -> None:
    told = found.explain()
    assert "bought most for its damage" in told
    assert "saves" in told
    assert found.data["spent"]["training, epochs"] == 4.0
    page = render_search(found.data)
    assert "Why these choices" in page
    assert all(line in page for member in found.data["front"] for line in member["explained"]["bought"])


def test_run_again_it_is_done_at_once(found: ts.SearchResult) -> None:
    again = ts.search(model(), task(), document(), workdir=found.folder, rehearse=False)
    assert lasting(again) == lasting(found)
    assert all(member.result is None for member in again.front)  # nothing was run


def lost_at(folder: Path, found: ts.SearchResult, line: str) -> list[Any]:
    """Copy a finished search as if its worker had been killed after the first line of the journal with this text.

    Returns:
        The trials of the finished search; those in the copy's journal may be fewer.
    """
    shutil.copytree(found.folder, folder)
    (folder / "search.json").unlink()
    for later in ("runs", "front"):  # results of steps stay
        shutil.rmtree(folder / later)
    journal = folder / "study.journal"
    trials = list(optuna.load_study(study_name=found.folder.name, storage=open_storage(journal)).trials)
    lines = journal.read_text().splitlines(keepends=True)
    last = next(number for number, text in enumerate(lines) if line in text)
    text = "".join(lines[: last + 1])
    assert f'"pid":{os.getpid()},' in text
    journal.write_text(text.replace(f'"pid":{os.getpid()},', f'"pid":{2**22 + 1},'))
    return trials


def test_two_workers_that_die_in_their_trials_lose_nothing(found: ts.SearchResult, tmp_path: Path) -> None:
    """The second one's recipe goes on from the trial of the first, which a third worker has given another number."""
    out = tmp_path / "out"
    first, second = lost_at(out, found, '"param_name":"after"')
    assert second.params["after"] == first.number
    study = optuna.load_study(study_name="out", storage=open_storage(out / "study.journal"))
    study.enqueue_trial(second.system_attrs["fixed_params"])
    taken = study.ask()
    taken.set_user_attr("worker", study.trials[first.number].user_attrs["worker"])
    study.tell(first.number, state=TrialState.FAIL)
    study.enqueue_trial(first.system_attrs["fixed_params"], user_attrs={"instead_of": first.number})
    again = ts.search(model(), task(), document(), workdir=out, rehearse=False)
    numbers = [trial["number"] for trial in again.data["trials"]]
    assert numbers == [2, 3]
    assert [trial["figures"] for trial in again.data["trials"]] == [trial["figures"] for trial in found.data["trials"]]
    assert again.data["spent"]["training, epochs"] == 4.0


def test_a_proposal_that_was_lost_is_made_again(found: ts.SearchResult, tmp_path: Path) -> None:
    """A worker is killed in its trial, and another one just after it has noticed that."""
    out = tmp_path / "out"
    lost_at(out, found, '"param_name":"after"')
    optuna.load_study(study_name="out", storage=open_storage(out / "study.journal")).tell(0, state=TrialState.FAIL)
    again = ts.search(model(), task(), document(), workdir=out, rehearse=False)
    assert [trial["figures"] for trial in again.data["trials"]] == [trial["figures"] for trial in found.data["trials"]]


def test_a_worker_with_a_folder_of_its_own_reads_the_tables(found: ts.SearchResult, tmp_path: Path) -> None:
    """Nothing is on its disk: it has the storage alone."""
    storage = found.folder / "study.journal"
    other = ts.search(
        model(), task(), document(), workdir=tmp_path / "far", storage=storage, study="out", rehearse=False
    )
    assert lasting(other) == lasting(found)
    assert not (other.folder / "tables").exists()


def test_a_group_with_one_width_is_left_alone_and_val_is_calibrated_on_without_train(tmp_path: Path) -> None:
    recipe = document(trials=1)
    del recipe["budget"]["epochs"]
    prune, _, quantize = recipe["step"]
    recipe["step"] = [{**prune, "min_channels": 8}, quantize]
    alone = ts.search(model(), replace(task(), train=None), recipe, workdir=tmp_path / "out", rehearse=False)
    (trial,) = alone.data["trials"]
    assert trial["state"] == "candidate"
    assert not any(name.startswith("width") for name in trial["parameters"])


def test_a_training_without_data_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    events: list[ts.Event] = []
    with pytest.raises(TaskError, match="no train batches"):
        ts.search(model(), replace(task(), train=None), document(), workdir=tmp_path / "out", progress=events.append)
    assert events == []


def test_a_bound_out_of_reach_is_named_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match="params of at most 1, at least") as caught:
        ts.search(model(), task(), document(params=1), workdir=tmp_path / "out", rehearse=False)
    assert caught.value.binding == ("params",)
    assert not (tmp_path / "out" / "front").exists()


def test_a_recipe_without_anything_to_decide_is_refused(tmp_path: Path) -> None:
    recipe = document()
    recipe["step"] = [{"do": "distill", "epochs": {"search": [1, 2]}}]
    with pytest.raises(RecipeError, match="method = 'sample'"):
        ts.search(model(), task(), recipe, workdir=tmp_path / "out", rehearse=False)
