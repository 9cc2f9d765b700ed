"""Mixed precision: the fewest layers out of the scheme that keep the metric, each choice measured as what ships."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchslim as ts
from tests.support import toy
from torchslim.core.layer_patterns import matches
from torchslim.core.seals import read_sealed
from torchslim.errors import QuantizeError
from torchslim.pipeline.recipe import parse_recipe
from torchslim.quantize.mixed_precision import Trials, exceptions, fewest

NAMES = "abcdefg"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(0, 40))
def test_of_damages_that_add_up_the_fewest_are_left_out(damages: list[int], allowed: int) -> None:
    hurts = dict(zip(NAMES, damages, strict=False))
    ranked = sorted(hurts, key=lambda name: -hurts[name])
    found = fewest(ranked, lambda left: sum(hurts.values()) - sum(hurts[name] for name in left), allowed)
    least = next(
        count
        for count in range(len(hurts) + 1)
        if any(sum(hurts.values()) - sum(each) <= allowed for each in combinations(hurts.values(), count))
    )
    assert (found.held, len(found.layers)) == (True, least)


@given(st.permutations(list(NAMES)), st.lists(st.integers(0, 9), min_size=7, max_size=7), st.integers(0, 63))
def test_whatever_the_ranking_no_single_layer_is_left_out_in_vain(
    ranked: list[str], damages: list[int], allowed: int
) -> None:
    hurts = dict(zip(NAMES, damages, strict=True))
    asked: list[tuple[str, ...]] = []

    def drop(left: Sequence[str]) -> float:
        asked.append(tuple(left))
        return float(sum(damages) - sum(hurts[name] for name in left))

    found = fewest(ranked, drop, allowed)
    assert found.held
    assert found.drop == sum(damages) - sum(hurts[name] for name in found.layers)
    assert all(found.drop + hurts[name] > allowed for name in found.layers)
    assert found.layers in asked  # what is returned was measured
    assert len(asked) == len(set(asked))
    assert len(asked) <= 2 + 3 + len(found.layers) + 7


@given(st.dictionaries(st.integers(0, 7), st.integers(0, 9), min_size=8, max_size=8), st.integers(0, 9))
def test_with_a_noisy_metric_what_is_returned_holds_or_is_the_nearest_that_was_measured(
    drops: dict[int, int], allowed: int
) -> None:
    seen: dict[tuple[str, ...], float] = {}

    def drop(left: Sequence[str]) -> float:
        seen[tuple(left)] = float(drops[len(left)])
        return seen[tuple(left)]

    found = fewest(list(NAMES), drop, allowed, most=6)
    assert found.drop == seen[found.layers]
    assert len(found.layers) <= 6
    assert found.held == (found.drop <= allowed)
    if not found.held:
        assert found.drop == min(seen.values())


# on a model whose layers differ ---------------------------------------------------------------------------------------


class Steep(nn.Module):
    """A head that reads small differences of large numbers: few bits of them, or of its weights, lose all."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.02 * torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(self.shift + x)


def steep(shift: float = 400.0) -> tuple[nn.Module, ts.Task]:
    torch.manual_seed(0)
    model = Steep(shift).eval()
    with torch.no_grad():
        model.head.weight -= model.head.weight.mean(1, keepdim=True)  # blind to what all inputs have in common
    x = torch.randn(256, 8)
    with torch.no_grad():
        labels = model(x).argmax(1)
    return model, ts.Task(train=[(x[:128], labels[:128])], val=[(x[128:], labels[128:])], metric="accuracy")


def context(model: nn.Module, task: ts.Task, **options: Any) -> ts.Context:
    return ts.Context(task=task, teacher=model, example_inputs=(task.val[0][0][:2],), **options)  # type: ignore[index]


@pytest.mark.slow
def test_the_layer_that_hurts_stays_and_its_record_says_why(tmp_path: Path) -> None:
    model, task = steep()
    plain = ts.compress(model, task, [ts.Quantize("int8", checks=None)], threads=1)
    assert plain.run["rows"][1]["metric"]["val"]["value"] < 90
    result = ts.compress(model, task, [ts.Quantize("int8", layers="auto", metric_drop=5.0)], threads=1)
    row = result.run["rows"][-1]
    assert row["metric"]["val"]["value"] >= 95  # of the artifact; the model that came is right by construction
    records = {each["layer"]: each for each in result.run["rows"][1]["layers"]}
    assert re.search("in float.*metric", records["head"]["reason"])
    assert [name for name, each in records.items() if each["action"] == "quantized"] != []
    assert not any("not quantized" in each for each in result.run["rows"][1]["warnings"])


@pytest.mark.slow
def test_four_bits_fall_back_to_eight() -> None:
    model, task = steep(40.0)
    outcome = ts.Quantize("int4-weights", layers="auto", metric_drop=10.0)(model, context(model, task))
    records = {each.layer: each for each in outcome.layers}
    assert records["head"].weight_bits == 8
    assert re.search("in 8 bits.*metric", records["head"].reason)
    assert {each.weight_bits for each in records.values()} == {4, 8}


@pytest.mark.slow
def test_what_is_known_beforehand_decides_the_order_and_nothing_is_measured_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, task = steep()
    step = ts.Quantize("int8", layers="auto", metric_drop=1.0)
    trials = Trials(model, context(model, task), step)
    assert trials.most == 2
    assert (trials.layers[0], sorted(trials.layers)) == ("head", ["first", "head", "second"])
    monkeypatch.setattr("torchslim.quantize.layerwise.damages", lambda *_: pytest.fail("measured"))
    priors = {"first": 2.0, "second": 0.5, "head": 0.1}
    informed = Trials(model, context(model, task, priors=priors), step)
    assert (informed.most, informed.layers) == (2, ("first", "second", "head"))


@pytest.mark.slow
def test_a_killed_choice_goes_on_from_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = steep()
    step = ts.Quantize("int8", layers="auto", metric_drop=5.0)
    ctx = context(model, task, state=tmp_path)
    first = step(model, ctx)
    known = json.loads(read_sealed(tmp_path / "mixed.rows", ctx.key))
    assert "base" in known
    assert "[]" in known
    monkeypatch.setattr(Trials, "metric", lambda *_: pytest.fail("measured again"))
    again = step(model, ctx)
    assert again.layers == first.layers
    (tmp_path / "mixed.rows").write_bytes(b"junk")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="mixed.rows.*truncated or changed.*measured again"):
        assert step(model, ctx).layers == first.layers


@pytest.mark.slow
def test_a_budget_that_cannot_be_kept_gives_the_nearest_and_says_so() -> None:
    model, task = steep()
    outcome = ts.Quantize("int8-weights", layers="auto", metric_drop=0.0)(
        model, context(model, ts.Task(val=task.val, train=task.train, metric=lambda predict, batches: _strict(predict)))
    )
    assert any(re.search("no choice of layers.*metric within 0", each) for each in outcome.warnings)


def _strict(predict: Any) -> float:
    """Minus the distance from float: integers are never as good."""
    model, task = steep()
    x = task.val[0][0]  # type: ignore[index]
    with torch.no_grad():
        return -float((predict(x) - model(x)).abs().sum())


@pytest.mark.slow
def test_with_training_the_choice_is_checked_after_it() -> None:
    model, task = steep()
    step = ts.Quantize(
        "int8", layers="auto", metric_drop=10.0, mode="qat", train=ts.Finetune(epochs=1, lr=1e-4), learned_step=False
    )
    outcome = step(model, context(model, task))
    assert outcome.history
    kept = [each.layer for each in outcome.layers if "hold the metric" in each.reason]
    assert "head" in kept or not kept
    value = task.evaluate(outcome.model)
    assert value >= 90 or any("nearest" in each for each in outcome.warnings)


def test_a_recipe_may_ask_for_it() -> None:
    text = (
        'model = "tests.support.toy:model"\ntask = "tests.support.toy:task"\n'
        '[[step]]\ndo = "quantize"\nscheme = "int8"\nlayers = "auto"\nmetric_drop = 0.5\n'
    )
    (step,) = parse_recipe(text).steps
    assert step == ts.Quantize("int8", layers="auto", metric_drop=0.5)
    step.check(ts.Context(task=toy.task(), teacher=toy.model(), example_inputs=(toy.images(2, 0)[0],)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "auto"}, "layers='auto' needs metric_drop"),
        ({"metric_drop": 0.5}, "metric_drop belongs to layers='auto'"),
        ({"layers": "some", "metric_drop": 0.5}, "'auto'.*'some'"),
        ({"layers": "auto", "metric_drop": -1.0}, "at least 0, got -1"),
        ({"layers": "auto", "metric_drop": float("nan")}, "finite.*nan"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        ts.Quantize("int8", **options)


class Attention(nn.Module):
    """One head whose products belong to the module that its projections are in."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1) @ self.value(x)


@pytest.mark.slow
def test_what_is_inside_of_a_layer_that_is_left_out_can_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Linear(16, 4)).eval()
    x = torch.randn(32, 6, 16)
    task = ts.Task(val=[(x,)], metric=ts.Metric(fn=lambda predict, batches: 0.0))
    trials = Trials(model, context(model, task), ts.Quantize("int8", layers="auto", metric_drop=0.0))
    assert trials.most == 4
    assert set(trials.layers) == {"0", "0.query", "0.key", "0.value", "1"}
    for left in (("0",), ("0", "0.key"), ("0", "0.query", "0.key", "1"), ("0.query", "1")):
        prepared = trials.way.prepared(model, trials.ctx, trials.exceptions(left), trials.data)[""]
        quantized = {each.layer for each in prepared.records if each.action == "quantized"}
        assert quantized == {"0.query", "0.key", "0.value", "1"} - set(left)
        products = any("matmul" in str(node.target) and "activation_post" in str(node.args)
                       for node in prepared.program.graph.nodes)  # fmt: skip
        assert products == ("0" not in left)


@given(st.sets(st.sampled_from(["a", "a.b", "a.b.c", "a.d", "ab", "e"])))
def test_exceptions_say_of_each_layer_what_is_meant(left: set[str]) -> None:
    layers = ["a", "a.b", "a.b.c", "a.d", "ab", "e"]
    said = exceptions(sorted(left), layers, "int8")
    for name in layers:
        last = [scheme for pattern, scheme in said.items() if matches(pattern, name, {})][-1:] or ["int8"]
        assert last == ["float" if name in left else "int8"]
