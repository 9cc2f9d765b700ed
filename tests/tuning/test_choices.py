"""Choices of a solver become ordinary recipes: chains of cuts and trainings, schemes by layer, dropped blocks."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

import torchslim as ts
from tests.support.searches import QUICK
from torchslim.allocation.problem import Decision
from torchslim.errors import RecipeError
from torchslim.tuning import make_space
from torchslim.tuning.choices import AFTER, TRAIN, SolvedSpace, epochs_by_prefix, solved_space

DECISIONS = (
    Decision(name="width conv1.weight[0]", options=(8, 6, 4)),
    Decision(name="width block.conv.weight[0]", options=(8, 4)),
    Decision(name="scheme conv1", options=("float", "int8", "int8-weights")),
    Decision(name="scheme block.conv", options=("float", "int8")),
    Decision(name="block block", options=("keep", "drop")),
)
MEMBERS = {DECISIONS[0].name: ("conv1.weight[0]",), DECISIONS[1].name: ("block.conv.weight[0]", "head.weight[1]")}


@pytest.fixture
def space() -> SolvedSpace:
    return solved_space(make_space(tomllib.loads(QUICK)), DECISIONS, MEMBERS, {"block": {"block"}})


def values(*options: Any, after: int = -1) -> dict[str, Any]:
    return {AFTER: after, **{each.name: option for each, option in zip(DECISIONS, options, strict=True)}}


def test_nothing_chosen_is_no_step(space: SolvedSpace) -> None:
    assert space.chosen(space.first)["step"] == []
    assert space.recipe(space.first).steps == ()


def test_a_choice_is_pruning_then_training_then_quantization(space: SolvedSpace) -> None:
    steps = space.chosen(values(6, 8, "int8", "float", "keep"))["step"]
    assert [step["do"] for step in steps] == ["prune", "distill", "quantize"]
    assert steps[0]["widths"] == {"conv1.weight[0]": 6}
    assert "sparsity" not in steps[0]
    assert (steps[0]["round_to"], steps[0]["min_channels"]) == (2, 2)
    assert (steps[2]["scheme"], steps[2]["layers"]) == ("int8", {"block.conv": "float"})
    space.recipe(values(6, 8, "int8", "float", "keep"))


@pytest.mark.parametrize(("given", "written"), [({}, True), ({"reconstruct": False}, False)])
def test_cuts_solve_for_what_remains_unless_the_recipe_refuses(given: dict[str, bool], written: bool) -> None:
    document = tomllib.loads(QUICK)
    document["step"][0] |= given
    space = solved_space(make_space(document), DECISIONS, MEMBERS, {"block": {"block"}})
    chosen = values(6, 8, "int8", "int8", "drop")
    assert [step["reconstruct"] for step in space.chosen(chosen)["step"] if step["do"] == "prune"] == [written] * 2
    assert [step.reconstruct for step in space.recipe(chosen).steps if isinstance(step, ts.Prune)] == [written] * 2


def test_equal_schemes_need_no_exceptions(space: SolvedSpace) -> None:
    assert "layers" not in space.chosen(values(8, 8, "int8", "int8", "keep"))["step"][-1]


def test_a_chain_repeats_the_steps_before_it_and_adds_its_own(space: SolvedSpace) -> None:
    space.trained[3] = values(6, 8, "int8", "int8", "keep")
    space.trained[5] = values(6, 4, "float", "float", "keep", after=3)
    steps = space.chosen(values(4, 4, "int8", "int8", "drop", after=5))["step"]
    assert [step["do"] for step in steps] == ["prune", "distill"] * 2 + ["prune", "prune", "distill", "quantize"]
    assert [step.get("widths") for step in steps if step.get("pattern") == "channel"] == [
        {"conv1.weight[0]": 6}, {"block.conv.weight[0]": 4}, {"conv1.weight[0]": 4},
    ]  # fmt: skip
    assert steps[4]["blocks"] == ["block"]
    first, whole = (
        space.chosen(each)["step"] for each in (space.trained[3], values(4, 4, "int8", "int8", "drop", after=5))
    )
    assert whole[:2] == first[:2]  # so that their result is shared


def test_a_recipe_may_leave_out_its_own_training_alone(space: SolvedSpace) -> None:
    space.trained[3] = values(6, 8, "int8", "int8", "keep")
    steps = space.chosen({**values(4, 8, "int8", "int8", "keep", after=3), TRAIN: False})["step"]
    assert [step["do"] for step in steps] == ["prune", "distill", "prune", "quantize"]


def test_shared_trainings_are_counted_once(space: SolvedSpace) -> None:
    space.trained[0] = values(6, 8, "int8", "int8", "keep")
    child = values(4, 8, "int8", "int8", "keep", after=0)
    counted: dict[str, int] = {}
    for each in (space.trained[0], child):
        counted |= epochs_by_prefix(space.recipe(each), space.chosen(each))
    assert sum(counted.values()) == 4  # two trainings of two epochs


def test_what_goes_with_a_block_is_not_named(space: SolvedSpace) -> None:
    steps = space.chosen(values(8, 4, "int8", "float", "drop"))["step"]
    assert steps[1]["widths"] == {"head.weight[1]": 4}  # a member of the group that stays
    assert "layers" not in steps[-1]


def test_stored_values_cannot_lead_in_a_circle_or_nowhere(space: SolvedSpace) -> None:
    with pytest.raises(RecipeError, match="not known"):
        space.chosen(values(6, 8, "int8", "int8", "keep", after=7))
    space.trained[1] = values(6, 8, "int8", "int8", "keep", after=2)
    space.trained[2] = values(6, 8, "int8", "int8", "keep", after=1)
    with pytest.raises(RecipeError, match="not known"):
        space.chosen(values(4, 8, "int8", "int8", "keep", after=1))
