"""Equalisation and smoothing change no function; rounding methods lose less than rounding to nearest."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchslim.core.step import Context
from torchslim.core.task import Task
from torchslim.errors import QuantizeError, RecipeError
from torchslim.graph.export import capture
from torchslim.pipeline.recipe import parse_recipe
from torchslim.quantize import Helpers, Quantize, convert, prepare, sqnr, static, weights
from torchslim.quantize.accuracy_options import BEST as BEST_OPTIONS
from torchslim.quantize.aten_ops import weighted
from torchslim.quantize.equalize import equalize, smooth
from torchslim.quantize.weight_rounding import adaround, columns, gptq


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def program_of(model: nn.Module, x: Tensor) -> Any:
    program = capture(model.eval(), (x,)).program.module()
    program.graph.set_codegen(torch.fx.graph.CodeGen())
    program.recompile()
    return program


class Chain(nn.Module):
    """Conv, depthwise, pointwise, pooled, two linears; channels of very different size."""

    def __init__(self, spread: float = 100.0) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3)
        self.two = nn.Conv2d(8, 8, 3, groups=8)
        self.three = nn.Conv2d(8, 6, 1, bias=False)
        self.four = nn.Linear(6, 10)
        self.five = nn.Linear(10, 4)
        with torch.no_grad():
            self.one.weight[0] *= spread
            self.two.weight[3] *= spread
            self.four.weight[:, 1] *= spread

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.three(torch.relu(self.two(torch.relu(self.one(x))))))
        return self.five(torch.relu(self.four(x.mean((2, 3)))))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(spread=st.floats(1e-3, 1e4), seed=st.integers(0, 100))
def test_equalisation_changes_no_function(spread: float, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Chain(spread).double()
    x = rand(4, 3, 9, 9, seed=seed).double()
    program = program_of(model, x)
    pairs = equalize(program)
    assert pairs == [("one", "two"), ("two", "three"), ("four", "five")]
    torch.testing.assert_close(program(x)[0], model(x), rtol=1e-9, atol=1e-9)


def test_equalised_ranges_are_equal() -> None:
    x = rand(4, 3, 9, 9)
    program = program_of(Chain(), x)
    equalize(program, iterations=200)
    layers = [node for node in program.graph.nodes if weighted(node)]
    found = [
        getattr(program, str(node.args[1].target)) if "." not in str(node.args[1].target) else None for node in layers
    ]
    four, five = found[3], found[4]
    torch.testing.assert_close(four.abs().amax(1), five.abs().amax(0), rtol=1e-3, atol=1e-5)


def test_equalisation_leaves_what_others_read() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return self.two(y) + y

    x = rand(2, 3, 4, 4)
    assert equalize(program_of(Residual(), x)) == []
    clipped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 3, 1))
    assert equalize(program_of(clipped, x)) == [], "relu6 does not scale"


class Block(nn.Module):
    """A layer norm with outliers, read by two linear layers; another one behind a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        with torch.no_grad():
            self.norm.weight[2] = 60
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.last(x + self.q(y) * torch.sigmoid(self.k(y)))
        return self.head(y)


@pytest.mark.slow
def test_smoothing_changes_no_function_and_tames_outliers() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Block()
    x = rand(16, 5, 8)
    program = program_of(model.double(), x.double())
    assert smooth(program, [[x.double()]], 0.5) == ["norm", "last"]
    torch.testing.assert_close(program(x.double())[0], model(x.double()), rtol=1e-9, atol=1e-9)
    model.float()
    plain = static(model, [(x,)], runtime="openvino")
    smoothed = static(model, [(x,)], runtime="openvino", helpers=Helpers(smooth=0.5))
    assert sqnr(model(x), smoothed(x)) > sqnr(model(x), plain(x)) + 1


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), rand(2, 4, 9, 9)),
        (nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2), rand(2, 4, 9, 9)),
        (nn.Conv2d(4, 4, 4, padding="same", groups=4), rand(2, 4, 9, 9)),
        (nn.Conv1d(4, 6, 3, padding="valid"), rand(2, 4, 9)),
        (nn.Conv3d(2, 4, 2, padding=1), rand(2, 2, 4, 4, 4)),
        (nn.Linear(4, 5), rand(2, 3, 4)),
    ],
)
def test_columns_times_rows_are_the_layer(layer: Any, x: Tensor) -> None:
    program = program_of(layer, x)
    node = next(node for node in program.graph.nodes if weighted(node))
    found = columns(node, weighted(node), x, tuple(layer.weight.shape[2:]))  # type: ignore[arg-type]
    rows = layer.weight.flatten(1).view(len(found), -1, found.shape[-1])
    product = found @ rows.transpose(1, 2)  # (groups, positions, outputs of the group)
    y = (
        layer(x) - layer.bias.view(-1, *[1] * (x.dim() - 2))
        if not isinstance(layer, nn.Linear)
        else layer(x) - layer.bias
    )
    expected = y.flatten(0, -2) if isinstance(layer, nn.Linear) else y.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(torch.cat(list(product), -1), expected, rtol=1e-4, atol=1e-5)


def reference_gptq(weight: np.ndarray, step: np.ndarray, moments: np.ndarray, low: int, high: int) -> np.ndarray:
    """One weight after another; the inverse is that of the columns that are left, computed anew each time."""
    moments = moments + 0.01 * moments.diagonal().mean() * np.eye(len(moments))
    left, out = weight.copy(), np.empty_like(weight)
    remaining = list(np.argsort(-moments.diagonal(), kind="stable"))
    while remaining:
        inverse = np.linalg.inv(moments[np.ix_(remaining, remaining)])
        first = remaining[0]
        out[:, first] = np.clip(np.rint(left[:, first] / step[:, first]), low, high)
        error = (left[:, first] - out[:, first] * step[:, first]) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0][None]
        remaining.pop(0)
    return out


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), inputs=st.integers(1, 20))
def test_gptq_is_the_reference_and_no_worse_than_nearest(seed: int, rows: int, inputs: int) -> None:
    weight = rand(rows, inputs, seed=seed).double()
    x = rand(200, inputs, seed=seed + 1).double() @ rand(inputs, inputs, seed=seed + 2).double()
    moments = x.T @ x
    steps = (weight.abs().amax(1, keepdim=True) / 7).expand_as(weight)
    found = gptq(weight, steps, moments, -7, 7)
    expected = reference_gptq(weight.numpy(), steps.numpy(), moments.numpy(), -7, 7)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert found.abs().max() <= 7


def loss(integers: Tensor, weight: Tensor, steps: Tensor, moments: Tensor) -> float:
    error = (integers.double() * steps - weight).double()
    return float((error @ moments * error).sum())


@pytest.mark.slow
@pytest.mark.parametrize("method", [gptq, adaround])
def test_rounding_methods_lose_less(method: Any) -> None:
    ratios = []
    for seed in range(5):
        weight = rand(16, 32, seed=seed).double()
        x = rand(500, 32, seed=seed + 50).double() @ rand(32, 32, seed=seed + 90).double()
        moments = x.T @ x
        steps = (weight.abs().amax(1, keepdim=True) / 7).expand_as(weight)
        nearest = (weight / steps).round().clamp(-7, 7)
        with torch.random.fork_rng():
            found = method(weight, steps, moments, -7, 7)
        assert torch.equal(found, found.round())
        ratios.append(loss(found, weight, steps, moments) / loss(nearest, weight, steps, moments))
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_models_are_stored_as_chosen(rounding: Any, bits: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Chain(1.0).eval()
    x = rand(64, 3, 9, 9)
    plain = weights(model, (x,), bits=bits)
    better = weights(model, (x,), bits=bits, helpers=Helpers(rounding=rounding), batches=[(x,)])
    assert sqnr(model(x), better(x)) > sqnr(model(x), plain(x))


@pytest.mark.slow
def test_bias_correction_takes_back_the_mean_error() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = rand(64, 3, 9, 9) + 2
    errors = []
    for correct in (False, True):
        quantized = weights(model, (x,), bits=4, helpers=Helpers(correct_biases=correct), batches=[(x,)])
        errors.append((quantized(x) - model(x)).mean((0, 2, 3)).abs().max())
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_biases_are_corrected_by_what_a_rounding_method_changed(bits: int) -> None:
    """It has put its integers in the place of the weights: the shift is that from the weights before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)).eval()
    x = rand(64, 3, 9, 9) + 2
    errors = []
    for correct in (False, True):
        helpers = Helpers(rounding="gptq", correct_biases=correct)
        quantized = weights(model, (x,), bits=bits, helpers=helpers, batches=[(x,)])
        errors.append((quantized(x) - model(x)).mean((0, 2, 3)).abs().max())
    assert errors[1] < 0.2 * errors[0]


def test_bad_options_are_refused() -> None:
    with pytest.raises(QuantizeError, match="rounding.*'nearest', 'gptq', 'adaround'.*'up'"):
        Quantize(rounding="up")  # type: ignore[arg-type]
    with pytest.raises(QuantizeError, match="smooth.*between 0 and 1.*got 2"):
        Helpers(smooth=2)
    with pytest.raises(QuantizeError, match="training does their work"):
        Quantize(mode="qat", correct_biases=True)
    with pytest.raises(QuantizeError, match="need data"):
        weights(Chain(), (rand(2, 3, 9, 9),), helpers=Helpers(rounding="gptq"))
    with pytest.raises(QuantizeError, match="smoothing.*activations"):
        prepare(Block(), (rand(2, 5, 8),), helpers=Helpers(smooth=0.5))


def test_several_options_work_together() -> None:
    x = rand(32, 5, 8)
    helpers = Helpers(equalize=True, smooth=0.3, rounding="gptq", correct_biases=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Block().eval()
    prepared = prepare(model, (x,), helpers=helpers, batches=[(x,)])
    prepared.calibrate([(x,)])
    assert sqnr(model(x), convert(prepared)(x)) > 30


BEST = Helpers(**BEST_OPTIONS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Helpers()),
        ({"smooth": "off"}, Helpers()),
        ({"accuracy": "best"}, BEST),
        ({"accuracy": "best", "rounding": "nearest"}, replace(BEST, rounding="nearest")),
        ({"accuracy": "best", "smooth": "off"}, replace(BEST, smooth=None)),
        ({"accuracy": "best", "smooth": 0.8, "equalize": True}, replace(BEST, smooth=0.8, equalize=True)),
        ({"accuracy": "best", "correct_biases": False}, replace(BEST, correct_biases=False)),
        ({"accuracy": "best", "mode": "qat"}, replace(BEST, rounding="nearest", correct_biases=False)),
    ],
)
def test_best_accuracy_stands_for_helpers_and_what_is_set_wins(options: Any, expected: Helpers) -> None:
    assert Quantize(**options).helpers() == expected


def test_best_accuracy_is_valid_in_recipes() -> None:
    recipe = 'model = "a:b"\ntask = "a:c"\n[[step]]\ndo = "quantize"\naccuracy = "best"\nsmooth = "off"\n'
    assert parse_recipe(recipe).steps == (Quantize(accuracy="best", smooth="off"),)
    with pytest.raises(RecipeError, match="'plain', 'best'"):
        parse_recipe(recipe.replace('"best"', '"most"'))
    with pytest.raises(QuantizeError, match="accuracy.*'plain', 'best'.*'most'"):
        Quantize(accuracy="most")  # type: ignore[arg-type]


class Attention(nn.Module):
    """A layer norm whose output has channels far larger than the others, and a network behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[::8] *= 30

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def quantized_by(step: Quantize, model: nn.Module, batches: Any) -> Any:
    task = Task(val=[(each, None) for each in batches], metric=lambda predict, given: 0.0)
    task = replace(task, calibration=task.val)
    ctx = Context(task=task, teacher=model, example_inputs=(batches[0],))
    step.check(ctx)
    return step(copy.deepcopy(model), ctx).model


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4-weights"])
@pytest.mark.parametrize("make", [lambda: Chain(1.0), Attention])
def test_best_accuracy_is_nearer_to_float(make: Any, scheme: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    shape = (64, 3, 9, 9) if isinstance(model, Chain) else (64, 5, 32)
    seen, new = [rand(*shape, seed=seed) for seed in range(3)], rand(*shape, seed=9)
    plain, best = (
        sqnr(model(new), quantized_by(Quantize(scheme, accuracy=accuracy), model, seen)(new))
        for accuracy in ("plain", "best")
    )
    assert best > plain


class Spoken(nn.Module):
    """No norm, no bias, one recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weights", "int4-weights"])
@pytest.mark.parametrize(
    "make", [Spoken, lambda: nn.Sequential(nn.Conv1d(4, 4, 1, bias=False), nn.Tanh(), nn.ConvTranspose1d(4, 2, 3))]
)
def test_best_accuracy_leaves_alone_what_it_does_not_fit(make: Any, scheme: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    x = rand(16, 4, 3)
    assert sqnr(model(x), quantized_by(Quantize(scheme, accuracy="best"), model, [x])(x)) > 10
