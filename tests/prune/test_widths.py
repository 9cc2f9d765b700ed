"""Explicit widths of groups: by any name, exactly, and refused where they cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support import toy
from tests.support.channel_steps import context, wide
from torchslim.errors import PruneError, SelectError
from torchslim.pipeline.recipe import parse_recipe
from torchslim.prune.structured.plan import analyze
from torchslim.prune.structured.selection import Amount
from torchslim.prune.structured.widths import steps, widths_of

INPUTS = (toy.images(2, 2)[0],)


def step(**fields: Any) -> ts.Prune:
    return ts.Prune(pattern="channel", **fields)


@pytest.mark.parametrize("name", ["stem", "back", "norm", "stem.weight", "inner.weight[1]", "stem.bias[0]", "ba*k"])
def test_any_member_names_its_group(name: str) -> None:
    small = ts.prune.channels(wide(), INPUTS, widths={name: 20})
    assert (small.stem.out_channels, small.back.out_channels, small.last.in_channels) == (20, 20, 20)
    assert (small.inner.out_channels, small.last.out_channels) == (48, 64)  # not named: not pruned


@settings(max_examples=12, deadline=None)
@given(widths=st.tuples(st.integers(1, 32), st.integers(1, 48), st.integers(1, 64)), seed=st.integers(0, 9))
def test_steps_and_widths_are_inverse(widths: tuple[int, int, int], seed: int) -> None:
    plan = analyze(wide(), INPUTS)
    coupling = plan.coupling()
    names = [coupling.groups[unit.groups[0]].name for unit in coupling.units]
    assert names == ["stem.weight[0]", "inner.weight[0]", "last.weight[0]"]
    amount = Amount(widths=dict(zip(names, widths, strict=True)), round_to=1, min_channels=1)
    kept = steps(plan.model, coupling, amount)
    assert widths_of(coupling, kept) == amount.widths
    assert steps(plan.model, coupling, Amount(widths=widths_of(coupling, kept), round_to=1, min_channels=1)) == kept


def test_later_patterns_override_earlier_ones() -> None:
    small = ts.prune.channels(wide(), INPUTS, widths={"*": 24, "inner": 40})
    assert (small.stem.out_channels, small.inner.out_channels, small.last.out_channels) == (24, 40, 24)


class Heads(nn.Module):
    """Attention of four heads of eight dimensions, with fused projections, and an LSTM behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.lstm = nn.LSTM(32, 24, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x + self.attention(x, x, x)[0])[0].mean(1))


@pytest.mark.slow
def test_widths_are_those_that_inspect_lists() -> None:
    x = torch.randn(2, 5, 32)
    for group in ts.prune.inspect(Heads(), (x,)).groups:
        if group.prunable:
            small = ts.prune.channels(Heads(), (x,), widths={group.members[0]: group.width // 2})
            widths = [
                other.width for other in ts.prune.inspect(small, (x,)).groups if group.members[0] in other.members
            ]
            assert widths == [group.width // 2]
    assert ts.prune.channels(Heads(), (x,), widths={"lstm": 10}).lstm.hidden_size == 10


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"widths": {"stemm": 8}}, SelectError, "stem"),
        ({"widths": {"inner.weight[7]": 8}}, SelectError, r"near names: .*inner.weight\[0\]"),
        ({"widths": {"stem": 20, "back": 24}}, PruneError, "20 to 'stem' and 24 to 'back'"),
        ({"widths": {"stem": 33}}, PruneError, "give 1 to 32"),
        ({"widths": {"head": 2}}, PruneError, "stay: reaches an output"),
        ({"widths": {"stem": 20}, "round_to": 8}, PruneError, "no multiple of round_to=8"),
        ({"widths": {"stem": 4}, "min_channels": 8}, PruneError, "min_channels=8 must stay"),
        ({"widths": {"stem": 32}}, PruneError, "has these widths already"),
        ({"widths": {"stem": 0}}, PruneError, "at least 1"),
        ({"widths": {}}, PruneError, "names no layer"),
        ({"widths": {"stem": 20}, "of": "macs"}, PruneError, "leave them out"),
        ({"widths": {"stem": 20}, "sparsity": 0.5}, PruneError, "not both"),
    ],
)
def test_refused(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ts.prune.channels(wide(), INPUTS, **fields)


def test_the_step_says_what_belongs_together() -> None:
    for fields, says in (({"widths": {"a": 1}, "sparsity": 0.5}, "not both"), ({}, "nothing to do")):
        with pytest.raises(PruneError, match=says):
            step(**fields)
    with pytest.raises(PruneError, match="for pattern 'channel'"):
        ts.Prune(sparsity=0.5, widths={"stem": 20})
    with pytest.raises(SelectError, match="near names: stem"):
        step(widths={"sten": 20}).check(context())


def test_a_recipe_prunes_to_widths_after_an_earlier_cut() -> None:
    text = (
        'model = "m:f"\ntask = "m:t"\n[[step]]\ndo = "prune"\npattern = "channel"\nwidths = { stem = 16, inner = 40 }\n'
    )
    (first,) = parse_recipe(text, "recipe.toml").steps
    assert first == step(widths={"stem": 16, "inner": 40})
    ctx = context()
    once = first(wide(), ctx).model
    again = step(widths={"inner*": 24, "stem": 16})(once, ctx).model  # 16 already: stays
    assert (again.stem.out_channels, again.inner.out_channels, again.last.out_channels) == (16, 24, 64)
    about = ts.surgery(again)["rounds"][1]["about"]
    assert about["widths"] == {"inner*": 24, "stem": 16}
    assert about["sparsity"] == pytest.approx(1 - about["left"])


@pytest.mark.slow
def test_rounds_go_to_the_widths_in_equal_steps() -> None:
    train = ts.Finetune(epochs=1, optimizer="sgd", lr=0.01)
    outcome = step(widths={"inner": 24, "last": 63}, schedule="iterative", rounds=3, train=train)(wide(), context())
    records = ts.surgery(outcome.model)["rounds"]
    kept = [
        len(cut["kept"])
        for each in records
        for cut in each["cuts"]
        if (cut["weight"], cut["dim"]) == ("inner.weight", 0)
    ]
    assert kept == [40, 32, 24]
    assert outcome.model.last.out_channels == 63
    assert not outcome.warnings


def test_parts_are_named_by_the_paths_of_the_whole_model() -> None:
    whole = nn.Sequential(wide(), nn.Linear(toy.CLASSES, 8), nn.Linear(8, toy.CLASSES))
    ctx = context(teacher=whole, parts={"0": [(toy.images(4, 2)[0],)]})
    outcome = step(widths={"0.stem": 12, "0.last.weight[0]": 30})(whole, ctx)
    assert (outcome.model[0].stem.out_channels, outcome.model[0].last.out_channels) == (12, 30)
    with pytest.raises(PruneError, match="names no layer of the parts '0'"):
        step(widths={"1": 4})(whole, ctx)
