"""The outputs that a converted graph is checked by are those of its own operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import torchslim as ts
from torchslim.quantize.samples import outputs


def grid(scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype, other: int | None = None):
    """A graph that quantizes its input and dequantizes it, twice or, with `other`, once on another grid."""
    import torchao  # noqa: F401 - registers the operations

    operations, graph = torch.ops.quantized_decomposed, Graph()
    arguments = (scale, zero_point, low, high, dtype)
    stored = graph.call_function(operations.quantize_per_tensor.default, (graph.placeholder("x"), *arguments))
    read = [graph.call_function(operations.dequantize_per_tensor.default, (stored, *arguments))]
    second = arguments if other is None else (scale, other, low, high, dtype)
    read.append(graph.call_function(operations.dequantize_per_tensor.default, (stored, *second)))
    graph.output(tuple(read))
    return GraphModule(nn.Module(), graph)


GRIDS = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-(2**15), 2**15 - 1)}


@given(st.sampled_from(list(GRIDS)), st.floats(1e-6, 1e3), st.floats(0, 1), st.integers(0, 10**6), st.booleans())
def test_rounding_in_one_operation_gives_the_same_numbers(dtype, scale, place, seed, differs):
    low, high = GRIDS[dtype]
    scale = torch.tensor(scale).item()
    zero_point = low + round(place * (high - low))
    generator = torch.Generator().manual_seed(seed)
    ties = (torch.randint(low - 3, high + 3, (64,), generator=generator) + 0.5 - zero_point) * scale
    extremes = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), -float("inf"), torch.finfo(torch.float32).min])
    x = torch.cat([torch.randn(256, generator=generator) * scale * 100, ties, extremes])
    program = grid(scale, zero_point, low, high, dtype, low if differs else None)
    expected, (values,) = program(x), outputs(program, [[x]])
    for value, right in zip(values, expected, strict=True):
        assert torch.equal(value, right)


class Mixed(nn.Module):
    """Convolutions, a pool between them, and a concatenation of two grids."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(x).relu(), 2)
        return self.head(torch.cat([x, self.second(x).relu()], 1).mean((2, 3)))


@pytest.mark.slow  # 3 s: a capture
def test_a_quantized_model_gives_its_own_outputs() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 12, 12),) for _ in range(2)]
    model = ts.quantize.static(Mixed().eval(), batches)
    run = [torch.randn(3, 3, 12, 12)]
    assert torch.equal(outputs(model.program, [run])[0][0], model(*run))
