"""Widths are multiples of `round_to`, counted in channels; where parts must stay equal and forbid it, that gives way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchslim as ts
from tests.support.channel_laws import assert_runs, remove, scramble
from torchslim.artifact import model_size
from torchslim.prune.structured.plan import analyze
from torchslim.prune.structured.removal import tolerance
from torchslim.prune.structured.selection import Amount


class Block(nn.Module):
    """Norms by groups before convolutions, and a way around them."""

    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.around = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.around(x) + self.conv2(F.silu(self.norm2(hidden)))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Down and up again, with joins."""

    def __init__(self, wide: int, wider: int, groups: int) -> None:
        super().__init__()
        self.first, self.down1 = nn.Conv2d(3, wide, 3, padding=1), Block(wide, wide, groups)
        self.down2, self.middle = Block(wide, wider, groups), Block(wider, wider, groups)
        self.up2, self.up1 = Block(2 * wider, wider, groups), Block(wider + wide, wide, groups)
        self.norm, self.last = nn.GroupNorm(groups, wide), nn.Conv2d(wide, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(self.first(x))
        two = self.down2(F.avg_pool2d(one, 2))
        x = self.up2(torch.cat([self.middle(two), two], 1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2.0), one], 1))
        return self.last(F.silu(self.norm(x)))  # type: ignore[no-any-return]


def unet(wide: int, wider: int, groups: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return scramble(UNet(wide, wider, groups)), (torch.randn(1, 3, 4, 4),)


@pytest.mark.slow
@pytest.mark.parametrize(("wide", "wider", "groups"), [(32, 64, 8), (64, 64, 32), (48, 96, 16)])
def test_half_of_a_network_of_group_norms_goes_with_the_default_rounding(wide: int, wider: int, groups: int) -> None:
    model, inputs = unet(wide, wider, groups)
    shrunk = ts.prune.channels(model, inputs, 0.5)
    assert model_size.parameters(model) / model_size.parameters(shrunk) > 1.85
    assert all(each.out_channels % 8 == 0 for each in shrunk.modules() if isinstance(each, nn.Conv2d) and each is not shrunk.last)  # fmt: skip
    assert ts.surgery(shrunk)["rounds"][0]["about"]["uneven"] == {}
    assert_runs(model, shrunk, inputs, sizes=(2,))


@pytest.mark.slow
@pytest.mark.parametrize(("wide", "wider", "groups"), [(20, 40, 5), (24, 48, 3), (36, 60, 12)])
def test_rounding_gives_way_where_groups_forbid_multiples_and_the_user_is_told(
    wide: int, wider: int, groups: int
) -> None:
    model, inputs = unet(wide, wider, groups)
    with pytest.warns(UserWarning, match="round_to=8 gave way.*groups.*equal") as told:
        shrunk = ts.prune.channels(model, inputs, 0.5)
    about = ts.surgery(shrunk)["rounds"][0]["about"]
    missed = any("cannot be reached" in str(each.message) for each in told)
    assert missed or abs(about["left"] - 0.5) < 0.06
    assert model_size.parameters(model) / model_size.parameters(shrunk) > 1.6
    name, (old, new) = next(iter(about["uneven"].items()))
    layer = shrunk.get_submodule(name.rpartition(".")[0])
    assert old > new == layer.weight.shape[0]
    assert new % 8
    assert new % groups == 0
    assert_runs(model, shrunk, inputs, sizes=(2,))


def test_rounding_gives_way_group_by_group() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 40, 3), nn.GroupNorm(5, 40), nn.Conv2d(40, 2, 1)]
    model, inputs = scramble(nn.Sequential(*layers)), (torch.randn(1, 3, 7, 7),)
    _, done = remove(model, inputs, 0, 0.5, scope="layer", round_to=8, min_channels=8)
    assert done.model[0].out_channels % 8 == 0  # nothing forbids it there
    assert done.model[2].out_channels in (15, 20, 25)


@pytest.mark.slow
def test_the_least_channels_are_counted_in_channels() -> None:
    model, inputs = unet(32, 64, 8)
    shrunk = ts.prune.channels(model, inputs, 0.9, min_channels=16, round_to=1)
    convolutions = [each for each in shrunk.modules() if isinstance(each, nn.Conv2d) and each is not shrunk.last]
    assert min(each.out_channels for each in convolutions) == 16


@pytest.mark.slow
def test_a_target_is_missed_by_more_than_one_step_of_one_unit_only_with_a_warning() -> None:
    model, inputs = unet(32, 64, 8)
    plan = analyze(model, inputs)
    assert tolerance(plan, plan.coupling(), Amount()) < 0.1
    with pytest.warns(UserWarning, match="cannot be reached"):
        ts.prune.channels(model, inputs, 0.9, min_channels=16)
