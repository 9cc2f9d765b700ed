"""What holds of every runtime: it computes what the quantized graph says, and tells which kernels do it.

aoti compiles for long and makes its kernels as inductor does: test_aoti.py has one of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.compiled import deploy
from tests.support.deployment_models import trained_conv
from tests.support.quantized import Block, Tagger, quantized
from torchslim.quantize import sqnr, static
from torchslim.runtimes import RUNTIMES, Kernel, find_runtime, kernels

COMPILED = ("inductor", "onnxruntime", "openvino", "executorch")
LAYERS = {"stem", "depthwise", "pointwise", "hidden", "head"}


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2),
    "depthwise": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "relu": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
    "relu6": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6()),
    "addition": Add,
    "max pool": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", COMPILED)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_differs_by_at_most_one_step(name: str, runtime: str) -> None:
    torch.manual_seed(0)
    model = static(OPERATIONS[name]().eval(), [(images(),)], runtime=runtime)
    scale = [
        node.args[1]
        for node in model.program.graph.nodes  # type: ignore[union-attr]
        if node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default
    ][-1]
    x = images(40)
    steps = (deploy(model, (images(3),), runtime=runtime, threads=1)(x) - model(x)).abs() / scale
    assert (steps <= 1.001).double().mean() >= 0.999


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    return static(trained_conv(), [(images(),)])


@pytest.mark.slow
@pytest.mark.parametrize("runtime", COMPILED)
def test_a_network_runs_in_integers_and_says_so(runtime: str, converted: nn.Module) -> None:
    deployed = deploy(converted, (images(3),), runtime=runtime, threads=1)
    for count in (1, 2, 5):
        assert sqnr(converted(images(count)), deployed(images(count))) >= 30
    found = kernels(deployed)
    assert all(isinstance(each, Kernel) and each.type for each in found)
    assert {layer for each in found if each.integer for layer in each.layers} >= LAYERS
    working = [each for each in found if set(each.layers) & LAYERS]
    assert len(working) == len(LAYERS), "each layer is computed once"


@pytest.mark.slow
@pytest.mark.parametrize("runtime", COMPILED)
def test_a_float_network_runs_in_floats_and_says_so(runtime: str) -> None:
    found = kernels(deploy(trained_conv(), (images(3),), runtime=runtime, threads=1))
    assert {layer for each in found for layer in each.layers} >= LAYERS
    assert not any(each.integer for each in found)


@pytest.mark.slow
def test_eager_computes_everything_in_floats(converted: nn.Module) -> None:
    found = kernels(deploy(converted, (images(3),), runtime="eager"))
    assert found
    assert not any(each.integer for each in found)


def test_every_runtime_tells() -> None:
    assert all(find_runtime(name).kernels is not None for name in RUNTIMES)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["inductor", "openvino", "executorch"])
@pytest.mark.parametrize("mode", ["static", "dynamic", "weights"])
def test_linears_agree_with_the_graph_in_every_scheme(mode: Any, runtime: str) -> None:
    x = torch.randn(4, 7, 32)
    converted, captured = quantized(Block(), x, mode)
    deployed = find_runtime(runtime).compile(captured, source=converted, threads=1)
    for count in (1, 4):
        before = x[:count].clone()
        in_float = mode == "weights" and runtime != "executorch"  # which rounds the rows that it multiplies
        assert sqnr(converted(before.clone()), deployed(before)) >= (100 if in_float else 30)
        assert torch.equal(before, x[:count]), "the caller's tensor was written to"
    integers = {each.layer for each in kernels(deployed) if each.integer}
    if mode == "weights" and runtime == "inductor":
        assert not integers, "it computes such layers with floats, made once"
        assert not any("dequantize_per_channel" in each.node for each in kernels(deployed))
    else:
        assert integers >= {"up", "down", "head"}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["inductor", "openvino", "executorch"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_agree_with_the_graph(kind: str, runtime: str) -> None:
    x = torch.randn(4, 3, 6)  # inductor makes the code of a GRU step by step
    converted, captured = quantized(Tagger(kind), x, "dynamic")
    deployed = find_runtime(runtime).compile(captured, source=converted, threads=1)
    assert sqnr(converted(x[:3]), deployed(x[:3])) >= 30


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return y + self.conv(x), x + self.linear(y)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", COMPILED)
def test_inputs_are_not_written_to(runtime: str) -> None:
    """The compiler adds in place, into an input too, if it is let."""
    model, x, y = TwoWays().eval(), images(3), images(3) + 1
    deployed = deploy(model, (x, y), runtime=runtime, threads=1)
    expected, before = model(x, y), (x.clone(), y.clone())
    for found, wanted in zip(deployed(x, y), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
