"""What `inspect` says of a model is what a removal then does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support import models, toy
from tests.support.deployment_models import trained_conv
from torchslim.artifact.model_size import macs
from torchslim.core.reason import Reason
from torchslim.errors import PruneError, RecipeError, SelectError, TorchslimError
from torchslim.pipeline.model_spec import load_model, make_inputs
from torchslim.prune import ChannelGroup, Inspection

IMAGES = (torch.randn(2, 3, 6, 6),)
TOKENS = (torch.arange(8).reshape(2, 4),)


def group(found: Inspection, member: str) -> ChannelGroup:
    (one,) = [each for each in found.groups if member in each.members]
    return one


def test_a_group_names_its_members_width_and_what_is_at_stake() -> None:
    found = ts.prune.inspect(trained_conv(), IMAGES)
    hidden = group(found, "hidden.weight[0]")
    assert hidden.members == ("hidden.weight[0]", "hidden.bias[0]", "head.weight[1]")
    assert (hidden.width, hidden.parameters, hidden.macs) == (16, 8 * 16 + 16 + 16 * 5, 2 * (8 * 16 + 16 * 5))
    assert hidden.prunable
    stream = group(found, "stem.weight[0]")
    assert {"norm.running_mean[0]", "depthwise.weight[0]", "pointwise.weight[0]", "hidden.weight[1]"} <= set(
        stream.members
    )
    pixels = 2 * 6 * 6
    assert stream.macs == pixels * (3 * 8 * 9 + 8 * 9 + 8 * 8) + 2 * 8 * 16
    assert stream.parameters == 3 * 8 * 9 + 2 * 8 + (8 * 9 + 8) + (8 * 8 + 8) + 8 * 16
    assert found.parameters == sum(each.numel() for each in trained_conv().parameters())
    assert found.macs == macs(trained_conv(), IMAGES).total


def test_what_is_at_stake_is_what_one_channel_less_saves_times_the_width() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    stake = group(ts.prune.inspect(model, (torch.ones(1, 4),)), "0.weight[0]")
    shrunk = ts.prune.channels(model, (torch.ones(1, 4),), 1 / 6, of="channels", round_to=1, min_channels=1)
    saved = sum(each.numel() for each in model.parameters()) - sum(each.numel() for each in shrunk.parameters())
    assert saved * stake.width == stake.parameters
    spared = macs(model, (torch.ones(1, 4),)).total - macs(shrunk, (torch.ones(1, 4),)).total
    assert spared * stake.width == stake.macs


@pytest.mark.slow
def test_why_a_group_stays() -> None:
    found = ts.prune.inspect(models.Encoder(), TOKENS)
    assert Reason.OUTPUT.given_in(group(found, "head.weight[0]").reason)
    assert Reason.LOOKED_UP.given_in(group(found, "embed.weight[0]").reason)
    assert not group(found, "embed.weight[0]").extent, "a vocabulary is worth seeing"
    assert group(found, "embed.weight[1]").prunable
    excluded = ts.prune.inspect(models.Encoder(), TOKENS, exclude="*linear1")
    assert Reason.EXCLUDED.given_in(group(excluded, "encoder.layers.0.linear1.weight[0]").reason)


@pytest.mark.slow
def test_heads_are_whole_or_in_parts() -> None:
    name = "encoder.layers.0.self_attn.out_proj.weight[1]"
    widths = {
        heads: group(ts.prune.inspect(models.Encoder(), TOKENS, heads=heads), name).width for heads in ("whole", "dim")
    }  # type: ignore[arg-type]
    assert widths == {"whole": 2, "dim": 4}


class Split(nn.Module):
    """Two halves that are multiplied must stay equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.up(x).chunk(2, -1)
        return self.down(torch.tanh(left) * right)


class Positions(nn.Module):
    """A learnt table of positions, and a buffer of whole numbers that looks something up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 7, 6))
        self.register_buffer("order", torch.arange(7).flip(0))
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) + self.table)[:, self.order])


def test_extents_and_position_tables_are_told_from_channels() -> None:
    conv = ts.prune.inspect(trained_conv(), IMAGES)
    assert group(conv, "stem.weight[2]").extent
    assert not group(conv, "stem.weight[1]").extent, "the input's channels are channels"
    found = ts.prune.inspect(Positions(), (torch.randn(2, 7, 5),))
    assert group(found, "table[1]").extent
    assert group(found, "order[0]").extent
    assert group(found, "table[2]").prunable
    assert all(each.reason and not each.prunable for each in found.groups if each.extent)


@pytest.mark.slow
def test_every_group_may_go_or_has_a_reason() -> None:
    for model, inputs in (
        (trained_conv(), IMAGES), (models.Recurrent(), (torch.randn(2, 4, 5),)), (models.Tied(), TOKENS),
        (Split(), (torch.randn(2, 5),)), (toy.model(), (toy.images(2, 0)[0],)),
    ):  # fmt: skip
        found = ts.prune.inspect(model, inputs)
        assert any(each.prunable for each in found.groups)
        for each in found.groups:
            assert each.prunable != bool(each.reason)


def test_the_table_and_the_json_say_the_same() -> None:
    found = ts.prune.inspect(trained_conv(), IMAGES)
    data = json.loads(json.dumps(found.to_dict()))
    assert [each["members"] for each in data["groups"]] == [list(each.members) for each in found.groups]
    assert {each["prunable"] for each in data["groups"]} == {True, False}
    short, full = str(found), found.table(all=True)
    assert "and 8 more" in short or "more" in short
    assert "not shown: 4 kernel extents and position tables" in short
    assert "kernel's extent" not in short
    assert "kernel's extent" in full
    assert "not shown" not in full
    for each in found.groups:
        assert all(member in full for member in each.members)
        assert (f"{each.parameters:,}" in short) or each.extent


def test_the_model_is_left_as_it_is() -> None:
    model = trained_conv().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ts.prune.inspect(model, IMAGES)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(PruneError, match="heads must be"):
        ts.prune.inspect(model, IMAGES, heads="some")  # type: ignore[arg-type]
    with pytest.raises((PruneError, SelectError), match="matches no layer"):
        ts.prune.inspect(model, IMAGES, include="stm")


# --- as the command line names models and inputs ---


def with_inputs() -> tuple[nn.Module, Any]:
    return trained_conv(), IMAGES


def broken() -> nn.Module:
    raise ValueError("no weights on this machine")


NOTHING = 3


def test_inputs_are_made_from_sizes_the_same_each_time() -> None:
    first, second = make_inputs(["2x3x4", "1x77:int64"]), make_inputs(["2x3x4", "1x77:int64"])
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    assert torch.equal(first[0], second[0])
    assert set(first[1].unique().tolist()) == {0, 1}
    named = make_inputs(["tokens=1x4:int32", "mask=4:bool", "scale=3:bfloat16"])
    assert isinstance(named, dict)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in named.items()} == {
        "tokens": (torch.int32, (1, 4)), "mask": (torch.bool, (4,)), "scale": (torch.bfloat16, (3,))
    }  # fmt: skip
    assert bool(named["mask"].all())


@pytest.mark.parametrize(
    ("spec", "inputs", "message"),
    [
        ("tests.support.toy", ["1x1x8x8"], "must be written 'package.module:name'"),
        ("tests.support.toy:nothing", ["1x1x8x8"], "has no 'nothing'"),
        ("tests.support.toy:model", [], "example inputs.*one --input"),
        (
            "tests.support.toy:model",
            ["1x3x8x8"],
            "'tests.support.toy:model'.*does not run.*RuntimeError: Given groups=1",
        ),
        ("tests.support.toy:model", ["1,1,8,8"], "input.*sizes"),
        ("tests.support.toy:model", ["1x1x8x8:floaty"], "dtype 'floaty'"),
        ("tests.support.toy:model", ["0x1x8x8"], "empty.*at least 1"),
        ("tests.support.toy:model", ["x=1x1x8x8", "1x1"], "different names.*position"),
        ("tests.support.toy:model", ["x=1x1x8x8", "x=1x1"], "different names.*position"),
        ("tests.support.toy:task", ["1x1x8x8"], r"nn.Module.*\(model, example_inputs\).*Task"),
        ("tests.prune.test_inspection:NOTHING", [], "nn.Module.*got int"),
        ("tests.prune.test_inspection:broken", ["1"], "cannot be made.*ValueError: no weights on this machine"),
        ("tests.support.deployment_models:architectures", ["1"], "must give an nn.Module"),
    ],
)
def test_what_cannot_be_inspected_is_refused(spec: str, inputs: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_model(spec, inputs)
    assert isinstance(caught.value, TorchslimError)


def test_a_callable_may_bring_its_inputs() -> None:
    model, inputs = load_model("tests.prune.test_inspection:with_inputs")
    assert inputs is IMAGES
    assert isinstance(model, nn.Module)
    _, given = load_model("tests.prune.test_inspection:with_inputs", ["5x3x6x6"])
    assert given[0].shape == (5, 3, 6, 6)  # type: ignore[index]
