"""Operations written with others: embedding bags and convolutions of as many groups as samples, as PyTorch has them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import torchslim as ts
from torchslim.graph.export import capture
from torchslim.graph.portable_ops import BAGS, GroupedConvolution, convolution_of_groups, portable

MODES = ("sum", "mean", "max")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_convolution_of_groups_is_pytorchs(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    groups, inputs, outputs = (data.draw(st.integers(1, 3)) for _ in range(3))

    def sizes(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(rank)]

    transposed = data.draw(st.booleans())
    kernel, stride, dilation, padding = sizes(1, 3), sizes(1, 3), sizes(1, 2), sizes(0, 2)
    extra = [data.draw(st.integers(0, max(a, b) - 1)) for a, b in zip(stride, dilation, strict=True)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = values(data.draw(st.integers(1, 2)), groups * inputs, *sizes(6, 8))
    weight = values(*((groups * inputs, outputs) if transposed else (groups * outputs, inputs)), *kernel)
    bias = values(groups * outputs) if data.draw(st.booleans()) else None
    if transposed:
        function = getattr(functional, f"conv_transpose{rank}d")
        wanted = function(x, weight, bias, stride, padding, extra, groups, dilation)
    else:
        wanted = getattr(functional, f"conv{rank}d")(x, weight, bias, stride, padding, dilation, groups)
        extra = [0] * rank
    options = GroupedConvolution(
        inputs=inputs, stride=stride, padding=padding, dilation=dilation, output_padding=extra, transposed=transposed
    )
    found = convolution_of_groups(options, x, weight, bias)
    torch.testing.assert_close(found, wanted)


class Bag(nn.Module):
    def __init__(self, mode: str, *, last: bool, padding: int | None) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 3, mode=mode, include_last_offset=last, padding_idx=padding)

    def forward(self, values: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.bag(values, offsets, weights)  # type: ignore[no-any-return]


def bags(rng: random.Random, values: int, count: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """Values and where bags of them begin; some are empty."""
    starts = [0, *sorted(rng.randint(0, values) for _ in range(count - 1))]
    numbers = [rng.randrange(7) for _ in range(values)]
    return torch.tensor(numbers), torch.tensor([*starts, values] if last else starts)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    mode=st.sampled_from(MODES), last=st.booleans(), padding=st.sampled_from([None, 0, -1]), seed=st.integers(0, 10**6),
    flat=st.booleans(),
)  # fmt: skip
def test_a_bag_without_the_operation_is_pytorchs(
    mode: str, last: bool, padding: int | None, seed: int, flat: bool
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Bag(mode, last=last and flat, padding=padding).eval().double()
    weighted = mode == "sum" and rng.random() < 0.5

    def inputs() -> tuple[Any, ...]:
        given = bags(rng, 9, 4, last=last) if flat else (torch.tensor([[rng.randrange(7)] * 2 for _ in range(4)]), None)
        return (*given, torch.randn(given[0].shape, dtype=torch.float64)) if weighted else given

    program = portable(capture(model, inputs(), None).program)
    assert all(node.target not in BAGS for node in program.graph.nodes)
    for _ in range(3):
        given = inputs()
        (found,) = program.module()(*(each for each in given if each is not None))
        torch.testing.assert_close(found, model(*given))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("mode", "flat"), [("mean", False), ("max", True), ("sum", True)])
def test_a_bag_runs_everywhere_with_any_batch(mode: str, flat: bool, runtime: str) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    model = Bag(mode, last=False, padding=0).eval()
    example = bags(rng, 9, 4, last=False) if flat else (torch.randint(7, (3, 5)),)
    deployed = ts.deploy(model, example, runtime=runtime)
    other = bags(rng, 9, 4, last=False) if flat else (torch.randint(7, (6, 5)),)
    torch.testing.assert_close(deployed(*other), model(*other))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_table_of_a_bag_is_quantized(runtime: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(30, 16), nn.Linear(16, 4)).eval()
    batches = [(torch.randint(30, (8, 5)),) for _ in range(3)]
    prepared = ts.quantize.prepare(model, batches[0], runtime=runtime, scheme="int8-weights")
    records = {each.layer: each for each in prepared.records}
    assert (records["0"].action, records["0"].weight_bits) == ("quantized", 8)
    other = (torch.randint(30, (3, 5)),)
    for quantized in (ts.quantize.convert(prepared), ts.quantize.static(model, batches, runtime=runtime)):
        deployed = ts.deploy(quantized, batches[0], runtime=runtime)
        assert ts.quantize.sqnr(quantized(*other), deployed(*other)) > 30
        assert ts.quantize.sqnr(model(*other), deployed(*other)) > 15


class Modulated(nn.Module):
    """A kernel for each sample, as in StyleGAN2; `up` transposes it."""

    def __init__(self, *, up: bool) -> None:
        super().__init__()
        self.style, self.weight, self.up = nn.Linear(4, 6), nn.Parameter(torch.randn(1, 6, 6, 3, 3)), up

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        kernels = (self.weight * (self.style(style) + 1)[:, None, :, None, None]).reshape(-1, 6, 3, 3)
        joined = x.reshape(1, -1, height, width)
        if self.up:
            found = functional.conv_transpose2d(joined, kernels, stride=2, groups=batch)
        else:
            found = functional.conv2d(joined, kernels, padding=1, groups=batch)
        return found.reshape(batch, 6, *found.shape[2:])


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
@pytest.mark.parametrize("up", [False, True])
def test_a_kernel_for_each_sample_leaves_the_batch_free(up: bool, runtime: str) -> None:
    torch.manual_seed(0)
    model = Modulated(up=up).eval()
    deployed = ts.deploy(model, (torch.randn(2, 6, 5, 5), torch.randn(2, 4)), runtime=runtime)
    assert deployed.spec.batch_axis == 0
    for batch in (1, 2, 5):
        given = (torch.randn(batch, 6, 5, 5), torch.randn(batch, 4))
        torch.testing.assert_close(deployed(*given), model(*given), rtol=1e-4, atol=1e-4)
