"""Ranges in recipes: every choice of values makes a plain recipe, and what cannot be is refused before any work."""

from __future__ import annotations

import json
import random
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.searches import SPACE
from torchslim.errors import RecipeError
from torchslim.pipeline.recipe import parse_document
from torchslim.training.finetune import Finetune
from torchslim.tuning import make_space
from torchslim.tuning.space import has_ranges


def space(change: str = "", by: str = "") -> Any:
    """The space of the recipe, with one change."""
    assert change in SPACE
    return make_space(tomllib.loads(SPACE.replace(change, by)))


def test_names_say_where_a_parameter_stands() -> None:
    assert [each.name for each in space().parameters] == [
        "runtime", "1-prune.skip", "1-prune.sparsity", "2-distill.epochs", "2-distill.lr", "2-distill.response",
        "3-quantize.scheme", "3-quantize.layers.head",
    ]  # fmt: skip
    assert space().runtimes == ("onnxruntime", "eager")


@pytest.mark.slow
@given(st.integers(0, 10_000))
def test_any_values_make_a_recipe_without_ranges(seed: int) -> None:
    found, generator = space(), random.Random(seed)
    values = {each.name: each.drawn(generator) for each in found.parameters}
    document = found.chosen(values)
    assert not has_ranges(document)
    assert "search" not in json.dumps(document)
    steps = parse_document(document).steps
    assert len(steps) == 2 + (not values["1-prune.skip"])
    assert steps[-1].layers == {"head": values["3-quantize.layers.head"]}  # type: ignore[attr-defined]
    assert steps[-2].epochs == values["2-distill.epochs"]  # type: ignore[attr-defined]


def test_the_document_stays_as_it_was() -> None:
    document = tomllib.loads(SPACE)
    found = make_space(document)
    found.chosen(found.starts[1])["step"][0]["sparsity"] = 0.99
    assert document == tomllib.loads(SPACE)


def test_a_search_begins_with_the_first_and_along_the_whole_recipe() -> None:
    found = space("metric_drop = 1.0", "trials = 40\nfinalists = 1")
    first, middle, last, skip, quarter, three, *_ = found.starts
    assert (first["1-prune.skip"], first["1-prune.sparsity"], first["2-distill.epochs"]) == (True, 0.2, 1)
    assert (middle["1-prune.sparsity"], middle["2-distill.epochs"]) == (0.5, 3)
    assert middle["2-distill.lr"] == pytest.approx(1e-3)
    assert only_changed(found, skip) == {"skip": False}
    for place, values in ((0.25, quarter), (0.5, middle), (0.75, three), (1.0, last)):
        assert values["1-prune.sparsity"] == pytest.approx(0.2 + place * 0.6)
        assert {each.name: values[each.name] for each in found.parameters if each.kind == "choice"} == {
            each.name: each.path[-1] != "skip" and each.choices[0] for each in found.parameters if each.kind == "choice"
        }


def only_changed(found: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What is not as in the first start, by the last part of its name."""
    return {name.rpartition(".")[2]: value for name, value in values.items() if value != found.first[name]}


def test_then_each_other_choice_is_tried_by_itself() -> None:
    found = space("metric_drop = 1.0", "trials = 40\nfinalists = 1")
    changed = [only_changed(found, each) for each in found.starts[6:]]
    assert [tuple(each) for each in changed] == [("runtime",), ("response",), ("response",), ("scheme",), ("head",)]
    assert len(space("metric_drop = 1.0", "trials = 10").starts) == 5
    assert len(space("metric_drop = 1.0", "trials = 1\nfinalists = 1").starts) == 3
    # what changes nothing, as the response of a step that is left out, and what needs another choice beside it
    skipped = space('do = "distill"', 'do = "distill"\nskip = { search = [true, false] }').starts[3:]
    assert all(each["2-distill.response"] == found.first["2-distill.response"] for each in skipped)
    change = 'scheme = { search = ["int8", "int8-weights"] }'
    needs = space(
        change, 'scheme = "int8"\nmode = { search = ["qat", "ptq"] }\ncorrect_biases = { search = [false, true] }'
    )
    assert {"mode": "ptq"} in [only_changed(needs, each) for each in needs.starts[3:]]
    assert {"correct_biases": True} not in [only_changed(needs, each) for each in needs.starts[3:]]


@pytest.mark.parametrize(
    ("change", "by", "message"),
    [
        ("[0.2, 0.8]", "[0.8, 0.2]", "low to high"),
        ("[0.2, 0.8]", "[0.2, 1.5]", r"1-prune.sparsity = 1.5.*\[0, 1\)"),
        ("[0.2, 0.8]", "[0.2]", r"\[low, high\].*2 to 100 choices"),
        ("[1, 8], log = true", "[0, 8]", "2-distill.epochs = 0 cannot be used"),
        ("[1, 8], log = true", "[0, 8], log = true", "low end.*above 0"),
        ("[1, 8], log = true", "[1.5, 8.0]", "2-distill.epochs = 1.5 cannot be used"),
        ("[1, 8], log = true", "[1, 8], step = 9", "step must be a whole number"),
        ("[1, 8], log = true", "[1, 8], steps = 2", "unknown key 'steps'"),
        ('["int8", "int8-weights"]', '["int8", "int9"]', "3-quantize.scheme = 'int9' cannot be used"),
        ('["int8", "int8-weights"]', '["int8", "int8"]', "choice.*twice"),
        ('["int8", "int8-weights"]', '["int8", "int4-weights"], log = true', "log and step.*range"),
        ('["onnxruntime", "eager"]', '["onnxruntime", "tensorrt"]', "runtime = 'tensorrt' cannot be used"),
        ('"tests.support.toy:task"', '{ search = ["a:b", "c:d"] }', "task cannot be searched over"),
        ("metric_drop = 1.0", "metric_drop = -1.0", "metric_drop.*finite.*at least 0"),
        ("metric_drop = 1.0", "metric_dorp = 1.0", "did you mean 'metric_drop'"),
        ("metric_drop = 1.0", 'minimize = ["speed"]', "minimize"),
        ("metric_drop = 1.0", 'minimize = ["size", "size"]', "has an entry twice"),
        ("metric_drop = 1.0", "trials = 0", "trials.*whole number"),
        ("metric_drop = 1.0", "latency_ms = 0.0", "latency_ms.*finite.*above 0"),
        ("skip = { search = [true, false] }", 'skip = "yes"', "'skip'.*true or false"),
    ],
)
def test_what_cannot_be_searched_is_refused(change: str, by: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        space(change, by)


def test_a_value_is_possible_where_some_other_values_allow_it() -> None:
    text = """
model = "a:b"
task = "c:d"
[[step]]
do = "quantize"
mode = { search = ["ptq", "qat"] }
learned_step = { search = [false, true] }
"""
    found = make_space(tomllib.loads(text))  # learned steps go with training alone
    with pytest.raises(RecipeError, match="learned_step belong to mode='qat'"):
        found.recipe({"1-quantize.mode": "ptq", "1-quantize.learned_step": True})


def test_a_recipe_without_ranges_is_for_a_run_and_the_other_way_round() -> None:
    plain = {"model": "a:b", "task": "c:d", "step": [{"do": "quantize"}]}
    with pytest.raises(RecipeError, match="nothing to search.*torchslim run"):
        make_space(plain)
    with pytest.raises(RecipeError, match="torchslim search"):
        parse_document({**plain, "step": [{"do": "prune", "sparsity": {"search": [0.1, 0.2]}}]})
    with pytest.raises(RecipeError, match="torchslim search"):
        parse_document({**plain, "budget": {}})


def test_the_key_tells_searches_apart_but_not_how_long_they_look() -> None:
    key = space().key
    assert space("metric_drop = 1.0", "metric_drop = 1.0\ntrials = 90").key == key
    assert space("metric_drop = 1.0", "metric_drop = 2.0").key != key
    assert space("[0.2, 0.8]", "[0.2, 0.7]").key != key


OPTIONS = """
[[step]]
do = "finetune"
epochs = 8
patience = { search = [2, 4] }
accumulate = { search = [1, 2, 4] }
average = { search = [0.9, 0.999] }
lr_scale = { "conv?" = { search = [1e-3, 1.0], log = true }, "type:BatchNorm2d" = 0 }
"""


def test_options_of_trainings_can_be_searched() -> None:
    found = make_space(tomllib.loads(SPACE.partition("[[step]]")[0] + OPTIONS))
    assert [each.name for each in found.parameters if each.path[0] == "step"] == [
        "1-finetune.patience", "1-finetune.accumulate", "1-finetune.average", "1-finetune.lr_scale.conv?",
    ]  # fmt: skip
    (step,) = parse_document(found.chosen(found.whole(0.5))).steps
    assert isinstance(step, Finetune)
    assert (step.patience, step.accumulate) == (3, 1)
    assert step.lr_scale == {"conv?": pytest.approx(10**-1.5), "type:BatchNorm2d": 0}
