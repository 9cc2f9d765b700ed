"""A pruned model is right at sizes that nobody gave, too."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import torchslim as ts
from tests.support import channel_networks as net
from tests.support.channel_laws import as_double, masked, remove, run, scramble
from torchslim.prune.dependency.sizes import other_inputs


class Mixing(nn.Module):
    """Position attention that folds (positions, channels) into (channels, height, width) without transposing."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.stem, self.hidden = nn.Conv2d(3, wide, 3, padding=1), nn.Conv2d(wide, 12, 3, padding=1)
        self.value, self.out = nn.Conv2d(12, wide, 1), nn.Conv2d(wide, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(self.stem(x)), 4)
        value = self.value(torch.tanh(self.hidden(x)))
        flat = value.flatten(2).transpose(1, 2)
        return self.out(torch.tanh(x + flat.reshape(value.shape)))


class Heads(nn.Module):
    """Patches, attention, a head over their mean: takes every size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 16, 4, 4), net.Attention(16, 4, 4, sdpa=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x)).mean(1))


class FixedSize(nn.Module):
    """Flattens a map into a linear layer: takes one size, and any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(torch.tanh(self.stem(x)).flatten(1))))


@pytest.mark.slow
@pytest.mark.parametrize("make", [Mixing, Heads])
@pytest.mark.parametrize("seed", range(3))
def test_the_pruned_model_equals_the_masked_one_at_other_sizes(make: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs = scramble(make(), seed), (torch.randn(1, 3, 8, 8),)
    _, done = remove(model, inputs, seed, 0.4)
    for size in ((8, 8), (8, 12), (16, 4), (20, 12)):
        given = as_double((torch.randn(2, 3, *size),))
        wanted, got = run(masked(model, done.surgery), given), run(done.model.double(), given)
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def test_channels_that_mix_with_positions_stay_and_the_reason_says_so() -> None:
    model, inputs = scramble(Mixing()), (torch.randn(1, 3, 8, 8),)
    said = {member: each for each in ts.prune.inspect(model, inputs).groups for member in each.members}
    assert re.search(r"another size.*\(2, 3, 8, 12\).*channels mix", said["value.weight[0]"].reason)
    assert said["hidden.weight[0]"].prunable
    shrunk = ts.prune.channels(model, inputs, 0.3, round_to=1, min_channels=1)
    record = ts.surgery(shrunk)
    assert record is not None
    assert record["rounds"][0]["about"]["sizes"] == ["(1, 3, 8, 8)", "(2, 3, 8, 12)"]
    assert shrunk.value.weight.shape[0] == 16
    assert shrunk.hidden.weight.shape[0] < 12


@pytest.mark.parametrize(("batch", "other"), [(2, 3), (3, 4), (8, 3)])
def test_a_model_of_one_size_is_checked_at_another_batch(batch: int, other: int) -> None:
    shrunk = ts.prune.channels(scramble(FixedSize()), (torch.randn(batch, 3, 8, 8),), 0.4, round_to=1, min_channels=1)
    record = ts.surgery(shrunk)
    assert record is not None
    assert record["rounds"][0]["about"]["sizes"] == [f"({batch}, 3, 8, 8)", f"({other}, 3, 8, 8)"]


@given(st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=4), min_size=1, max_size=3), st.booleans())
@settings(max_examples=50)
def test_other_inputs_have_the_same_ranks_types_and_ranges(shapes: list[list[int]], whole: bool) -> None:
    inputs = tuple(torch.randint(9, tuple(shape)) if whole else torch.rand(tuple(shape)) for shape in shapes)
    for other in other_inputs(inputs):
        assert [each.shape for each in other] != [each.shape for each in inputs]
        for one, two in zip(inputs, other, strict=True):
            assert one.dim() == two.dim()
            assert one.dtype == two.dtype
            assert set(two.reshape(-1).tolist()) <= set(one.reshape(-1).tolist())
