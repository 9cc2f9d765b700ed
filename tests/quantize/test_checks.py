"""What counts as off: figures of every output and channel, and what chance alone brings about."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchslim.errors import QuantizeError
from torchslim.quantize.checks import Checks, apart, faults, slack, worst

CHECKS = Checks()


def boxes_and_scores(samples: int, anchors: int, classes: int, last: bool) -> torch.Tensor:
    boxes = torch.rand(samples, 4, anchors) * 640
    scores = torch.rand(samples, classes, anchors) * 0.05
    both = torch.cat([boxes, scores], 1)
    return both.transpose(1, 2) if last else both


def noisy(value: torch.Tensor, decibels: float) -> torch.Tensor:
    return value + torch.randn_like(value) * value.std() * 10 ** (-decibels / 20)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), samples=st.integers(8, 24), anchors=st.integers(4, 40), classes=st.integers(1, 80),
    last=st.booleans(),
)  # fmt: skip
def test_scores_that_boxes_hide_are_found_whatever_dimension_they_are_in(seed, samples, anchors, classes, last):
    torch.manual_seed(seed)
    value = boxes_and_scores(samples, anchors, classes, last)
    step = 640 / 255
    rounded = (value / step).round() * step
    found = faults([[value]], [[rounded]], [0], CHECKS)
    dim = 2 if last else 1
    lost = {each.place.channel for each in found if each.place.dim == dim}
    assert lost == set(range(4, 4 + classes))
    assert {each.kind for each in found if each.place.dim == dim} == {"constant"}
    figure = worst([[value]], [[rounded]], [0])
    assert figure is not None
    assert figure.place.dim == dim
    assert figure.decibels < 0


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), shape=st.lists(st.integers(1, 12), min_size=1, max_size=3), samples=st.integers(1, 24),
    decibels=st.floats(20, 60), offset=st.floats(-3, 3),
)  # fmt: skip
def test_a_healthy_output_is_never_called_off(seed, shape, samples, decibels, offset):
    torch.manual_seed(seed)
    value = torch.randn(samples, *shape) + offset
    answer = value + torch.randn_like(value) * 10 ** (-decibels / 20)
    assert faults([[value]], [[answer]], [0], CHECKS) == []
    other = value + torch.randn_like(value) * 10 ** (-decibels / 20)
    assert apart([[value]], [[answer]], [[other]], [0], CHECKS) == []
    assert apart([[value]], [[answer]], [[answer]], [0], CHECKS) == []


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), samples=st.integers(1, 12), channels=st.integers(8, 200), positions=st.integers(1, 4)
)
def test_channels_that_are_dead_or_nearly_so_are_never_called_off(seed, samples, channels, positions):
    """After a ReLU some channels are zero, or differ from it once: two roundings to one grid differ there, too."""
    torch.manual_seed(seed)
    value = (torch.randn(samples, channels, positions) - 3 * torch.rand(channels, 1)).relu()
    value[:, 0], value[0, 1] = 0, 1
    step = float(value.max()) / 255
    graph, deployed = ((value + torch.randn_like(value) * step / 12).relu().div(step).round() * step for _ in range(2))
    graph[:, 0] = 0
    deployed[0, 0, 0] = step
    assert apart([[value]], [[graph]], [[deployed]], [0], CHECKS) == []
    deployed[:, 0] = 100 * step
    assert apart([[value]], [[graph]], [[deployed]], [0], CHECKS) != []


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 30), samples=st.integers(24, 64), data=st.data())
def test_one_lost_channel_is_named(seed, channels, samples, data):
    torch.manual_seed(seed)
    value = torch.randn(samples, channels) * torch.logspace(-2, 2, channels)
    channel = data.draw(st.integers(0, channels - 1))
    answer = value * 1.001
    answer[:, channel] = torch.randn(samples) * value[:, channel].std()
    found = faults([[value]], [[answer]], [0], CHECKS)
    assert [each.place.channel for each in found if each.place.dim == 1] == [channel]
    assert f"channel {channel} (dimension 1)" in found[-1].told([""])
    moved = apart([[value]], [[value * 1.001]], [[answer]], [0], CHECKS)
    assert channel in [each.place.channel for each in moved]


def test_a_batch_that_is_not_first_has_no_channels_of_its_own():
    torch.manual_seed(0)
    value = torch.randn(6, 16, 5)
    answer = value.clone()
    answer[:, 3] = 0  # a sample, not a channel
    assert all(each.place.dim != 1 for each in faults([[value]], [[answer]], [1], CHECKS))
    answer = value.clone()
    answer[2] = 0
    assert [(each.place.dim, each.place.channel) for each in faults([[value]], [[answer]], [1], CHECKS)] == [(0, 2)]


def test_values_that_are_not_finite_are_off_unless_float_has_them_too():
    value = torch.randn(8, 4)
    value[:, 0] = -math.inf
    assert faults([[value]], [[value]], [0], CHECKS) == []
    answer = value.clone()
    answer[0, 1] = math.nan
    assert [each.kind for each in faults([[value]], [[answer]], [0], CHECKS)] == ["not finite"]
    assert [each.kind for each in apart([[value]], [[value]], [[answer]], [0], CHECKS)] == ["not finite"]


def test_what_hardly_varies_and_what_is_seen_too_seldom_is_not_judged():
    torch.manual_seed(0)
    value = 10 + torch.randn(32, 3) * 1e-3  # below a step of its own 8-bit grid
    assert faults([[value]], [[torch.full_like(value, 10)]], [0], CHECKS) == []
    few = torch.randn(2, 1000)
    assert all(each.place.dim is None for each in faults([[few]], [[torch.randn(2, 1000)]], [0], CHECKS))
    tiny = torch.randn(32, 2) * torch.tensor([1e6, 1e-3])
    answer = tiny.clone()
    answer[:, 1] = 0
    assert faults([[tiny]], [[answer]], [0], CHECKS) == []


def test_elements_that_are_steps_away_are_counted():
    torch.manual_seed(0)
    value = torch.rand(16, 4, 100)
    graph = (value * 255).round() / 255
    deployed = graph.clone()
    deployed[0, 0, :3] += 3 / 255
    assert apart([[value]], [[graph]], [[deployed]], [0], CHECKS) == []  # 3 of 6400
    deployed[:2, 0, :10] += 6 / 255
    assert [each.kind for each in apart([[value]], [[graph]], [[deployed]], [0], CHECKS)].count("steps") > 0
    assert apart([[value]], [[graph]], [[deployed]], [0], Checks(apart_share=0.01, apart_db=30)) == []


@pytest.mark.parametrize(("count", "faulty"), [(2, False), (8, True)])
def test_few_elements_may_exceed_the_bound_by_chance(count: int, faulty: bool):
    torch.manual_seed(0)
    value = torch.rand(8, 4, 32)
    graph = (value * 255).round() / 255
    deployed = graph.clone()
    deployed.view(-1)[:count] += 2 / 255
    checks = Checks(apart_db=60)
    assert (len(apart([[value]], [[graph]], [[deployed]], [0], checks)) > 0) == faulty


def test_classes_are_integers():
    torch.manual_seed(0)
    value = torch.randint(0, 10, (16,))
    other = value.clone()
    other[:3] = 0
    assert faults([[value]], [[other]], [0], CHECKS) == []
    assert [each.kind for each in faults([[value]], [[torch.zeros_like(value)]], [0], CHECKS)] == ["constant"]


def test_outputs_of_other_sizes_are_not_compared():
    value, other = torch.randn(8, 3), torch.randn(5, 3)
    assert faults([[value]], [[other]], [0], CHECKS) == []
    # runs of several lengths are compared each by itself
    runs = [[torch.randn(8, 4, length)] for length in (3, 5)]
    assert faults(runs, runs, [0], CHECKS) == []


@pytest.mark.parametrize(("elements", "channels"), [(16, 1), (16, 10), (32, 10), (64, 1000), (512, 1000)])
def test_chance_follows_the_f_distribution(elements, channels):
    stats = pytest.importorskip("scipy.stats")
    exact = stats.f.isf(1e-3 / channels, elements, elements - 1)
    assert slack(elements, channels) == pytest.approx(exact, rel=0.15)
    assert slack(2, channels) == math.inf


@pytest.mark.parametrize(
    "wrong",
    [
        {"channel_db": math.nan},
        {"apart_db": 0},
        {"apart_share": 1.0},
        {"apart_share": -0.1},
        {"samples": 1},
        {"samples": 2.5},
        {"channel_db": "10"},
        {"apart_db": True},
    ],
)
def test_thresholds_have_ranges(wrong):
    with pytest.raises(QuantizeError, match=next(iter(wrong))):
        Checks(**wrong)
    with pytest.raises(QuantizeError, match="chanel_db"):
        Checks.of({"chanel_db": 3})
    with pytest.raises(QuantizeError, match="a mapping"):
        Checks.of(3)
    assert Checks.of({"channel_db": 3.0}) == Checks(channel_db=3.0)
    assert Checks.of(None) is None
