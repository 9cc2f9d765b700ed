"""A solved search of a toy model from end to end: its recipes, its explanations, resuming, and bounds out of reach."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

import torchslim as ts
from tests.support.searches import QUICK
from tests.support.toy import model, task
from torchslim.allocation.solver import Infeasible
from torchslim.errors import RecipeError
from torchslim.report import render_search

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
