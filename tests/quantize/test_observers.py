"""Observers: the range of each against NumPy, the laws all of them hold, and torchao's whole path with each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from torchslim.core.isolation import quiet
from torchslim.errors import QuantizeError
from torchslim.quantize.backend_profiles import PROFILES
from torchslim.quantize.lowering import fit_biases
from torchslim.quantize.observers import OBSERVERS, Histogram, Observer, observer
from torchslim.quantize.quantizer import SlimQuantizer, Specs
from torchslim.quantize.schemes import find_scheme

EPS = 1e-20
AFFINE = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255}
SYMMETRIC = {"dtype": torch.int8, "quant_min": -127, "quant_max": 127}
FORMS = {
    "uint8": {**AFFINE, "qscheme": torch.per_tensor_affine},
    "uint7": {**AFFINE, "quant_max": 127, "qscheme": torch.per_tensor_affine},
    "int8": {**SYMMETRIC, "qscheme": torch.per_tensor_symmetric},
    "int7": {**SYMMETRIC, "quant_min": -64, "quant_max": 63, "qscheme": torch.per_tensor_symmetric},
}
CHANNELS = {
    "uint8": {**AFFINE, "qscheme": torch.per_channel_affine},
    "int8": {**SYMMETRIC, "qscheme": torch.per_channel_symmetric},
}
EACH = pytest.mark.parametrize("name", OBSERVERS)
EACH_CHANNELS = pytest.mark.parametrize("name", [name for name, kind in OBSERVERS.items() if kind.per_channel])
EACH_FORM = pytest.mark.parametrize("form", FORMS)
FEWER = settings(max_examples=15)  # they are many already
HISTOGRAMS = [name for name, kind in OBSERVERS.items() if issubclass(kind.per_tensor, Histogram)]


def make(name: str, form: str = "uint8", **options: Any) -> Observer:
    return observer(name, **options)(eps=EPS, **FORMS[form])  # type: ignore[no-any-return]


def make_channels(name: str, form: str = "int8", **options: Any) -> Observer:
    return observer(name, per_channel=True, **options)(eps=EPS, **CHANNELS[form])  # type: ignore[no-any-return]


def shown(each: Observer, *batches: Tensor) -> Observer:
    for batch in batches:
        assert each(batch) is batch
    return each


def qparams(each: Observer, *batches: Tensor) -> tuple[np.ndarray, np.ndarray]:
    scale, zero_point = shown(each, *batches).calculate_qparams()
    assert scale.dtype == torch.float32
    return scale.numpy().astype(np.float64), zero_point.numpy().astype(np.int64)


def error_of(scale: float, zero_point: int, x: np.ndarray, form: str = "uint8") -> float:
    low, high = FORMS[form]["quant_min"], FORMS[form]["quant_max"]
    integers = np.clip(np.round(x / scale) + zero_point, low, high)
    return float(np.mean(((integers - zero_point) * scale - x) ** 2))


def sample(seed: int, count: int, kind: str, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    x = {
        "normal": x,
        "relu": x.relu(),
        "silu": nn.functional.silu(2 * x),
        "shifted": x.abs() + 1,
        "negative": -x.abs() - 0.5,
        "heavy": x / torch.rand(count, generator=generator).clamp(min=0.02),
    }[kind]
    return x * spread


KINDS = st.sampled_from(["normal", "relu", "silu", "shifted", "negative", "heavy"])
SEEDS = st.integers(0, 10_000)


# ---------------------------------------------------------------- references, in float64, from the formulas


def reference_qparams(low: float, high: float, form: str) -> tuple[float, int]:
    first, last = FORMS[form]["quant_min"], FORMS[form]["quant_max"]
    low, high = min(low, 0.0), max(high, 0.0)
    if FORMS[form]["qscheme"] == torch.per_tensor_symmetric:
        return max(max(-low, high) / ((last - first) / 2), EPS), 0
    scale = max((high - low) / (last - first), EPS)
    return scale, int(np.clip(first - np.round(low / scale), first, last))


def reference_histogram(x: np.ndarray, bins: int) -> tuple[np.ndarray, float]:
    """Counts of trunc(x / width) from -(bins - 1) on, and the width."""
    exponent = int(np.floor(np.log2(np.abs(x).max()))) + 1
    width = 2.0**exponent / bins
    counts = np.zeros(2 * bins - 1)
    for value in np.trunc(x / width).astype(int):
        counts[value + bins - 1] += 1
    return counts, width


def reference_percentile(x: np.ndarray, bins: int, percentile: float) -> float:
    """The magnitude below which this percentage of the histogram lies."""
    counts, width = reference_histogram(np.abs(x), bins)
    counts = counts[bins - 1 :]
    missing = percentile / 100 * len(x)
    for number, count in enumerate(counts):
        if count >= missing:
            return (number + missing / count) * width
        missing -= count
    raise AssertionError


def reference_error(x: np.ndarray, bins: int, form: str) -> Callable[[float, int], float]:
    """Expected squared error of a scale and zero point, values spread evenly over each bin of the histogram."""
    counts, width = reference_histogram(x, bins)
    points = 2**13 // bins  # of each bin
    values, weights = [], []
    for number in range(1 - bins, bins):
        count = counts[number + bins - 1]
        if number and count:
            side, away = np.sign(number), abs(number)
            nearest = max(away * width, np.abs(x[np.sign(x) == side]).min() if (np.sign(x) == side).all() else 0)
            farthest = min((away + 1) * width, np.abs(x[np.sign(x) == side]).max())
            values.append(side * (nearest + (farthest - nearest) * (np.arange(points) + 0.5) / points))
            weights.append(np.full(points, count / points))
    value, weight = np.concatenate(values), np.concatenate(weights)
    first, last = FORMS[form]["quant_min"], FORMS[form]["quant_max"]

    def error(scale: float, zero_point: int) -> float:
        integers = np.clip(np.round(value / scale) + zero_point, first, last)
        return float((weight * ((integers - zero_point) * scale - value) ** 2).sum())

    return error


def reference_entropy(x: np.ndarray, bins: int, form: str) -> tuple[float, float]:
    """Brute force over the thresholds, with loops over bins; see `clips.entropy_clip` for what it departs from."""
    counts, width = reference_histogram(x, bins)
    levels = FORMS[form]["quant_max"] - FORMS[form]["quant_min"]
    symmetric = FORMS[form]["qscheme"] == torch.per_tensor_symmetric
    number = np.arange(1 - bins, bins)
    counts[bins - 1] = counts[bins - 2] + counts[bins]
    low, high = min(x.min(), 0) / width, max(x.max(), 0) / width
    extent = np.floor(max(-low, high)) + 1
    best = (np.inf, low, high)
    for cut in sorted({int(np.ceil(extent * 2 ** (-step / 16))) for step in range(7 * 16 + 1)}, reverse=True):
        left, right = max(low, -cut), min(high, cut)
        if cut < extent and right - left < levels:
            continue
        inside = np.flatnonzero((np.abs(number) < cut) & (counts > 0))
        if not len(inside):
            continue
        p = {index: counts[index] for index in inside}
        p[inside[0]] += counts[number <= -cut].sum()
        p[inside[-1]] += counts[number >= cut].sum()
        scale = (2 * max(-left, right) if symmetric else right - left) / levels
        zero = -FORMS[form]["quant_min"] if symmetric else np.round(-left / scale)
        members: dict[int, list[int]] = {}
        for index in inside:
            center = number[index] + 0.5 * np.sign(number[index])
            members.setdefault(int(np.clip(np.round(center / scale) + zero, 0, levels)), []).append(index)
        q = {index: counts[group].mean() for group in members.values() for index in group}
        divergence = sum(p[index] * np.log(p[index] / q[index]) for index in inside)
        if divergence < best[0] - 1e-9:
            best = (divergence, left, right)
    return best[1] * width, best[2] * width


# ---------------------------------------------------------------- each observer against its reference


@EACH_FORM
@given(seed=SEEDS, kind=KINDS, spread=st.floats(1e-9, 1e9))
def test_min_max_is_the_formula(form: str, seed: int, kind: str, spread: float) -> None:
    batches = [sample(seed + part, 40, kind, spread) for part in range(3)]
    x = torch.cat(batches).numpy().astype(np.float64)
    scale, zero_point = qparams(make("min-max", form), *batches)
    expected, zero = reference_qparams(x.min(), x.max(), form)
    np.testing.assert_allclose(scale, [expected], rtol=1e-6)
    assert zero_point == [zero]


@pytest.mark.slow
@given(seed=SEEDS, constant=st.floats(0.01, 1))
@example(seed=0, constant=1.0)
def test_the_moving_average_is_a_mean_and_then_exponential(seed: int, constant: float) -> None:
    batches = [sample(seed + part, 40, "normal") for part in range(12)]
    low = high = 0.0
    for number, batch in enumerate(batches, 1):
        weight = max(constant, 1 / number)
        low += weight * (float(batch.min()) - low)
        high += weight * (float(batch.max()) - high)
    each = shown(make("moving-average", averaging_constant=constant), *batches)
    np.testing.assert_allclose([float(each.min_val), float(each.max_val)], [low, high], rtol=1e-5)
    scale, zero = reference_qparams(low, high, "uint8")
    assert qparams(each)[0] == pytest.approx(scale, rel=1e-5)
    assert abs(qparams(each)[1] - zero) <= 1  # float32 may round a tie the other way


@EACH_FORM
@given(seed=SEEDS, kind=KINDS, percentile=st.floats(50, 100))
def test_percentile_is_the_quantile_of_magnitudes(form: str, seed: int, kind: str, percentile: float) -> None:
    x = sample(seed, 500, kind)
    exact = x.numpy().astype(np.float64)
    each = shown(make("percentile", form, percentile=percentile), x)
    magnitude = reference_percentile(exact, 4096, percentile)
    low, high = max(exact.min(), -magnitude), min(exact.max(), magnitude)
    np.testing.assert_allclose([float(each.min_val), float(each.max_val)], [min(low, 0), max(high, 0)], rtol=1e-6)
    _, width = reference_histogram(exact, 4096)
    assert abs(magnitude - np.quantile(np.abs(exact), percentile / 100, method="inverted_cdf")) <= width * 1.0001


@pytest.mark.slow
@EACH_FORM
@FEWER
@given(seed=SEEDS, kind=KINDS, bins=st.sampled_from([16, 256]), bits=st.sampled_from([3, 8]))
def test_no_clip_has_a_smaller_error_than_that_of_mse(form: str, seed: int, kind: str, bins: int, bits: int) -> None:
    x = sample(seed, 400, kind)
    first, last = FORMS[form]["quant_min"], FORMS[form]["quant_max"]
    if bits == 3:
        first, last = (-3, 3) if first else (0, 7)
    each = observer("mse", bins=bins)(**{**FORMS[form], "quant_min": first, "quant_max": last}, eps=EPS)
    (scale,), (zero_point,) = qparams(each, x)
    exact = x.numpy().astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMS, "now", {**FORMS[form], "quant_min": first, "quant_max": last})
        error = reference_error(exact, bins, "now")
    low, high = min(exact.min(), 0), max(exact.max(), 0)
    symmetric = "int" in form and not form.startswith("u")
    full = (2 * max(-low, high) if symmetric else high - low) / (last - first)
    zeros = [0] if symmetric else range(first, last + 1)
    grid = [full * 2 ** (-step / 16) for step in range(0, 7 * 16 + 1, 1 if bits == 3 else 4)]
    best = min(error(candidate, zero) for candidate in grid for zero in zeros[:: max(1, len(zeros) // 16)])
    assert error(scale, zero_point) <= best * 1.003 + 1e-9 * len(exact)


@pytest.mark.slow
@EACH_FORM
@FEWER
@given(seed=SEEDS, kind=KINDS)
def test_entropy_is_the_smallest_divergence(form: str, seed: int, kind: str) -> None:
    x = sample(seed, 600, kind)
    each = shown(make("entropy", form, bins=512), x)
    low, high = reference_entropy(x.numpy().astype(np.float64), 512, form)
    np.testing.assert_allclose([float(each.min_val), float(each.max_val)], [low, high], rtol=1e-6)


def test_entropy_cuts_off_a_lone_outlier() -> None:
    x = torch.cat([sample(0, 100_000, "normal"), torch.tensor([80.0])])
    assert 3.5 < float(shown(make("entropy"), x).max_val) < 5


def test_entropy_does_not_cut_off_most_of_the_values() -> None:
    """A range that keeps nothing but one peak has a quantized distribution that fits it perfectly."""
    x = torch.cat([torch.ones(2000), 1 + 9 * torch.rand(1000, generator=torch.Generator().manual_seed(0))])
    assert float(shown(make("entropy"), x).max_val) > 5


def test_min_max_is_torchaos() -> None:
    x = sample(0, 1000, "silu").view(10, 100)
    theirs = MinMaxObserver(eps=EPS, **FORMS["uint8"])
    theirs(x)
    for mine, expected in zip(qparams(make("min-max"), x), theirs.calculate_qparams(), strict=True):
        np.testing.assert_allclose(mine, expected.numpy(), rtol=1e-6)
    theirs = PerChannelMinMaxObserver(eps=EPS, ch_axis=1, **CHANNELS["int8"])
    theirs(x)
    for mine, expected in zip(qparams(make_channels("min-max", ch_axis=1), x), theirs.calculate_qparams(), strict=True):
        np.testing.assert_allclose(mine, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("outlier", [8.0, 30.0, 100.0])
@EACH_FORM
def test_mse_really_has_a_smaller_error_than_min_max(form: str, outlier: float) -> None:
    x = torch.cat([sample(0, 50_000, "normal"), sample(1, 20, "normal", outlier)])
    exact = x.numpy().astype(np.float64)
    errors = {}
    for name in ("mse", "min-max"):
        (scale,), (zero_point,) = qparams(make(name, form), x)
        errors[name] = error_of(scale, zero_point, exact, form)
    assert errors["mse"] < 0.95 * errors["min-max"]


# ---------------------------------------------------------------- laws


@pytest.mark.slow
@EACH
@EACH_FORM
@FEWER
@given(seed=SEEDS, kind=KINDS, count=st.integers(1, 200), spread=st.floats(1e-12, 1e12))
def test_zero_is_exact_and_the_scale_positive(
    name: str, form: str, seed: int, kind: str, count: int, spread: float
) -> None:
    (scale,), (zero_point,) = qparams(make(name, form), sample(seed, count, kind, spread))
    assert 0 < scale < np.inf
    assert FORMS[form]["quant_min"] <= zero_point <= FORMS[form]["quant_max"]


@EACH
@EACH_FORM
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-40, -3e38, 6e-18])
def test_constants_are_as_exact_as_they_can_be(name: str, form: str, value: float) -> None:
    (scale,), (zero_point,) = qparams(make(name, form), torch.full((7,), value))
    assert 0 < scale < np.inf
    low, high = FORMS[form]["quant_min"], FORMS[form]["quant_max"]
    assert low <= zero_point <= high
    reached = (np.clip(np.round(value / scale) + zero_point, low, high) - zero_point) * scale
    assert abs(reached - value) <= (0 if value == 0 else scale * 0.51)


@EACH
@pytest.mark.parametrize(("kind", "expected"), [("relu", 0), ("shifted", 0), ("negative", 255)])
def test_no_integer_is_spent_on_a_sign_that_does_not_occur(name: str, kind: str, expected: int) -> None:
    assert qparams(make(name), sample(0, 3000, kind))[1] == [expected]


@EACH_FORM
@given(seed=SEEDS, kind=KINDS, count=st.integers(1, 200))
def test_the_hundredth_percentile_is_min_max(form: str, seed: int, kind: str, count: int) -> None:
    x = sample(seed, count, kind)
    for mine, expected in zip(
        qparams(make("percentile", form, percentile=100), x), qparams(make("min-max", form), x), strict=True
    ):
        assert np.array_equal(mine, expected)


@pytest.mark.slow
@EACH
@FEWER
@given(seed=SEEDS, kind=KINDS, cuts=st.lists(st.integers(0, 300), max_size=5), order=st.randoms(use_true_random=False))
def test_how_the_data_is_cut_into_batches_does_not_matter(
    name: str, seed: int, kind: str, cuts: Sequence[int], order: Any
) -> None:
    x = sample(seed, 300, kind)
    batches = [*torch.tensor_split(x, sorted(cuts))]  # some are empty
    order.shuffle(batches)
    if name == "moving-average":
        batches = [batch for batch in batches if batch.numel()]
        expected = np.mean([float(batch.max()) for batch in batches])
        assert float(shown(make(name), *batches).max_val) == pytest.approx(expected, rel=1e-5)
        return
    whole, parts = make(name), make(name)
    for mine, expected in zip(qparams(whole, x), qparams(parts, *batches), strict=True):
        assert np.array_equal(mine, expected)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[key]), key


@pytest.mark.slow
@EACH
@EACH_FORM
@FEWER
@given(seed=SEEDS, kind=KINDS, exponent=st.integers(-20, 20))
def test_the_scale_scales_with_the_data(name: str, form: str, seed: int, kind: str, exponent: int) -> None:
    x = sample(seed, 200, kind)
    scale, zero_point = qparams(make(name, form), x)
    scaled, same = qparams(make(name, form), x * 2.0**exponent)
    assert np.array_equal(scaled, scale * 2.0**exponent)
    assert np.array_equal(zero_point, same)


@pytest.mark.slow
@EACH_CHANNELS
@pytest.mark.parametrize("form", CHANNELS)
@FEWER
@given(seed=SEEDS, axis=st.integers(0, 2))
def test_per_channel_is_per_tensor_of_each_channel(name: str, form: str, seed: int, axis: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = [6, 7, 8]
    spread = 2.0 ** (
        8 * torch.rand([size if dim == axis else 1 for dim, size in enumerate(shape)], generator=generator)
    )
    batches = [torch.randn(shape, generator=generator) * spread for _ in range(2)]
    options = {"bins": 256} if name in HISTOGRAMS else {}
    scale, zero_point = qparams(make_channels(name, form, ch_axis=axis, **options), *batches)
    assert len(scale) == len(zero_point) == shape[axis]
    for channel in range(shape[axis]):
        alone = qparams(make(name, form, **options), *(batch.select(axis, channel) for batch in batches))
        np.testing.assert_allclose(scale[channel], alone[0][0], rtol=1e-6)
        assert zero_point[channel] == alone[1][0]


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_format_is_seen(name: str, dtype: torch.dtype) -> None:
    x = sample(0, 500, "normal").view(2, 5, 5, 10).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    for mine, expected in zip(qparams(make(name), x), qparams(make(name), x.float().contiguous()), strict=True):
        assert np.array_equal(mine, expected)


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_counts_are_exact_where_float32_stops_counting(name: str) -> None:
    each = shown(make(name), torch.ones(1).expand(2**24 + 3), torch.zeros(5))
    assert int(each.histogram.sum()) == 2**24 + 8  # type: ignore[operator]
    assert int(each.histogram.max()) == 2**24 + 3  # type: ignore[operator]


# ---------------------------------------------------------------- what is not a number, and nothing at all


@EACH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_left_out_counted_and_warned_of(name: str, bad: float) -> None:
    x = sample(0, 100, "normal")
    each = shown(make(name), torch.cat([x[:50], torch.tensor([bad, bad]), x[50:]]))
    assert int(each.ignored) == 2
    with pytest.warns(UserWarning, match="NaN or infinite.*left out"):
        mine = qparams(each)
    for got, expected in zip(mine, qparams(make(name), x), strict=True):
        assert np.array_equal(got, expected)


@EACH_CHANNELS
def test_a_channel_without_a_finite_value_leaves_the_others_alone(name: str) -> None:
    x = sample(0, 300, "normal").view(3, 100)
    whole, _ = qparams(make_channels(name), x)
    x[1] = torch.nan
    with pytest.warns(UserWarning, match="left out"):
        scale, zero_point = qparams(make_channels(name), x)
    assert scale.tolist() == [whole[0], 1, whole[2]]
    assert zero_point.tolist() == [0, 0, 0]


@EACH
@pytest.mark.filterwarnings("ignore:NaN or infinite")
@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3)], [torch.full((3,), np.nan)]])
def test_an_observer_that_saw_nothing_has_scale_one(name: str, batches: list[Tensor]) -> None:
    each = shown(make(name), *batches)
    with pytest.warns(UserWarning, match="no values"):
        assert qparams(each) == ([1], [0])


def test_no_scale_is_infinite() -> None:
    for name in OBSERVERS:
        (scale,), _ = qparams(make(name), torch.tensor([-3e38, 3e38]))
        assert scale == pytest.approx(6e38 / 255, rel=0.1)


# ---------------------------------------------------------------- inside torchao


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x).relu()).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def prepared(activation: Any, weight: Any, x: Tensor) -> tuple[nn.Module, torch.fx.GraphModule]:
    model = Net().eval()
    options = {"quant_min": -127, "quant_max": 127, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
    static = QuantizationSpec(torch.uint8, activation, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
    per_channel = QuantizationSpec(torch.int8, weight, **options)
    specs = Specs(static=static, dynamic=static, rows=static, weight=lambda scheme, axis: per_channel)
    quantizer = SlimQuantizer(lambda layer, stored: find_scheme("int8"), PROFILES["onnxruntime"], specs)
    with quiet():
        return model, prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)


def decibels(reference: Tensor, value: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - value).square().sum()))


@pytest.mark.slow
@pytest.mark.parametrize("activation", OBSERVERS)
@pytest.mark.parametrize("weight", [name for name, kind in OBSERVERS.items() if kind.per_channel])
def test_every_observer_quantizes_a_network(activation: str, weight: str) -> None:
    x = torch.randn(16, 3, 10, 10)
    model, graph = prepared(observer(activation, eps=EPS), observer(weight, per_channel=True, eps=EPS), x)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(graph(x), model(x)), "observing changes nothing"
        with quiet():
            fit_biases(graph)
            weights = [each for each in graph.modules() if isinstance(each, Observer) and each.per_channel]
            expected = [each.calculate_qparams()[0] for each in weights]
            converted = convert_pt2e(graph)
        assert decibels(model(x), converted(x)) > 25
    stored = [buffer for key, buffer in converted.named_buffers() if "scale" in key]
    assert sorted(each.tolist() for each in stored) == sorted(each.tolist() for each in expected)
    assert sorted(len(each) for each in stored) == [5, 8, 8]


@EACH_CHANNELS
def test_a_range_that_was_widened_is_the_one_that_is_quantized(name: str) -> None:
    x = torch.randn(4, 3, 10, 10)
    _, graph = prepared(observer("min-max", eps=EPS), observer(name, per_channel=True, eps=EPS), x)
    with torch.no_grad():
        graph(x)
        for each in graph.modules():
            if isinstance(each, Observer) and each.per_channel:
                each.max_val.copy_(torch.maximum(each.max_val, torch.tensor(12.7)))
        with quiet():
            converted = convert_pt2e(graph)
    scales = [buffer for key, buffer in converted.named_buffers() if "scale" in key]
    assert scales
    for scale in scales:
        torch.testing.assert_close(scale, torch.full_like(scale, 0.1))


@EACH_CHANNELS
def test_fake_quantization_uses_them(name: str) -> None:
    weight = torch.randn(6, 4, 3, 3)
    fake = FakeQuantize(observer=observer(name, per_channel=True, ch_axis=1, eps=EPS), **CHANNELS["int8"])
    assert decibels(weight, fake(weight)) > 30
    assert fake.scale.shape == (4,)
    fake = FakeQuantize(observer=observer(name, eps=EPS), **FORMS["uint8"])
    assert decibels(weight, fake(weight)) > 30


@EACH_CHANNELS
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_state_can_be_copied_saved_and_loaded(name: str, per_channel: bool) -> None:
    x = torch.randn(3, 50)

    def new() -> Observer:
        return make_channels(name) if per_channel else make(name)

    each = shown(new(), x[:, :25])
    copied, loaded = copy.deepcopy(each), new()
    shown(loaded, 100 * x) if not per_channel else None
    loaded.load_state_dict(each.state_dict())
    for other in (copied, loaded):
        for mine, expected in zip(qparams(each), qparams(other), strict=True):
            assert np.array_equal(mine, expected)
    for mine, expected in zip(qparams(each, x), qparams(loaded, x), strict=True):
        assert np.array_equal(mine, expected)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: observer("minmax"),
            "observer 'minmax'.*'min-max'.*percentile, mse, entropy",
        ),
        (lambda: observer("moving_average"), "did you mean 'moving-average'"),
        (lambda: observer("xyz"), "observer 'xyz'.*min-max"),
        (lambda: observer("entropy", per_channel=True), "'entropy'.*per channel.*min-max, .*mse"),
        (lambda: observer("percentile", percentile=0), "percentile.*above 0.*at most 100.*got 0"),
        (lambda: observer("percentile", percentile=101), "got 101"),
        (lambda: observer("percentile", percentile="most"), "cannot take"),
        (lambda: observer("moving-average", averaging_constant=0), "averaging_constant.*above 0"),
        (lambda: observer("mse", bins=1000), "bins.*power of two.*1000"),
        (lambda: observer("min-max", percentile=99), "'min-max' cannot take .*percentile"),
        (lambda: observer("min-max", quant_min=1, quant_max=5), "cannot take"),
        (lambda: observer("mse", is_dynamic=True), "MSE cannot be dynamic"),
        (lambda: observer("mse", qscheme=torch.per_channel_affine), "MSE.*per tensor.*torch.per_channel_affine"),
        (lambda: observer("mse", per_channel=True, qscheme=torch.per_tensor_affine), "PerChannelMSE is per channel"),
    ],
)
def test_what_cannot_be_is_said(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        call()


def test_a_channel_axis_of_changing_size_is_an_error() -> None:
    each = shown(make_channels("min-max", ch_axis=1), torch.ones(2, 3))
    with pytest.raises(QuantizeError, match="4 channels.*axis 1.*3"):
        each(torch.ones(2, 4))


def test_every_kind_says_what_it_is() -> None:
    for name, kind in OBSERVERS.items():
        assert kind.about
        assert type(make(name)) is kind.per_tensor
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "min_val" in repr(make(name))
