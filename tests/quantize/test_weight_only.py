"""Integers of 4 bits in groups: against NumPy, and the laws that they hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.quantized_graphs import int4_graph
from torchslim.errors import QuantizeError
from torchslim.graph.export import capture
from torchslim.graph.integer_patterns import find_int4
from torchslim.quantize.weight_only import dequantize_groups, pack_int4, quantize_groups, unpack_int4

sizes = st.tuples(st.integers(1, 5), st.integers(1, 70))
groups = st.sampled_from([2, 8, 16, 32, 64])


def weight(size: tuple[int, ...], seed: int, spread: float = 1.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def reference(rows: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Group by group: scale = max |w| / (2^(bits-1) - 1), round half to even."""
    highest = 2 ** (bits - 1) - 1
    values, scales = np.zeros(rows.shape, np.int8), []
    for row, line in enumerate(rows.astype(np.float32)):
        scales.append([])
        for start in range(0, len(line), group_size):
            group = line[start : start + group_size]
            scale = np.float32(max(np.abs(group).max() / np.float32(highest), 1e-20))
            values[row, start : start + group_size] = np.rint(group / scale).clip(-highest, highest)
            scales[-1].append(scale)
    return values, np.array(scales, np.float32)


def reference_bytes(values: np.ndarray, group_size: int) -> np.ndarray:
    rows, length = values.shape
    padded = np.zeros((rows, -(-length // group_size) * group_size), int)
    padded[:, :length] = values
    return np.array([[(a + 8) | (b + 8) << 4 for a, b in zip(row[0::2], row[1::2], strict=True)] for row in padded])


@given(size=sizes, group_size=groups, bits=st.integers(2, 8), seed=st.integers(0, 99), spread=st.floats(1e-6, 1e6))
def test_groups_are_the_reference_integers(
    size: tuple[int, int], group_size: int, bits: int, seed: int, spread: float
) -> None:
    rows = weight(size, seed, spread)
    values, scale = quantize_groups(rows, bits=bits, group_size=group_size)
    expected, steps = reference(rows.numpy(), bits, group_size)
    assert values.dtype == torch.int8
    np.testing.assert_array_equal(values.numpy(), expected)
    np.testing.assert_allclose(scale.numpy(), steps, rtol=1e-6)


@given(size=sizes, group_size=groups, seed=st.integers(0, 99))
def test_packing_is_the_reference_bytes_and_loses_nothing(size: tuple[int, int], group_size: int, seed: int) -> None:
    values = torch.randint(-8, 8, size, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(values, group_size)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), reference_bytes(values.numpy(), group_size))
    assert torch.equal(unpack_int4(packed, size[1]), values)


@given(size=sizes, group_size=groups, bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_the_error_is_at_most_half_a_step(size: tuple[int, int], group_size: int, bits: int, seed: int) -> None:
    rows = weight(size, seed)
    values, scale = quantize_groups(rows, bits=bits, group_size=group_size)
    error = (dequantize_groups(values, scale, group_size) - rows).abs()
    steps = scale.repeat_interleave(group_size, 1)[:, : size[1]]
    assert (error <= steps * (0.5 + 1e-5)).all()


@given(size=sizes, group_size=groups, seed=st.integers(0, 99), sparsity=st.floats(0, 1))
def test_zeros_stay_zeros(size: tuple[int, int], group_size: int, seed: int, sparsity: float) -> None:
    rows = weight(size, seed)
    rows[torch.rand(size, generator=torch.Generator().manual_seed(seed)) < sparsity] = 0
    values, scale = quantize_groups(rows, group_size=group_size)
    assert not values[rows == 0].any()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert not dequantize_groups(values, scale, group_size)[rows == 0].any()


@pytest.mark.slow
@settings(max_examples=8)
@given(outputs=st.integers(2, 6), inputs=st.integers(1, 70), group_size=groups, seed=st.integers(0, 99))
def test_the_graph_computes_with_the_dequantized_weight(outputs: int, inputs: int, group_size: int, seed: int) -> None:
    layer, x = nn.Linear(inputs, outputs), weight((3, inputs), seed)
    graph = int4_graph(layer, (x,), group_size=group_size)
    values, scale = quantize_groups(layer.weight, group_size=group_size)
    expected = nn.functional.linear(x, dequantize_groups(values, scale, group_size), layer.bias)
    with torch.no_grad():
        assert torch.equal(graph(x)[0], expected)
    stored = [each for each in graph.state_dict().values() if each.dim() == 2]
    assert sorted(str(each.dtype) for each in stored) == ["torch.float32", "torch.uint8"], "no float copy is left"


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer", [nn.Linear(50, 6), nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(5, 3, 3), nn.Conv1d(16, 4, 2)]
)
@pytest.mark.parametrize("lifted", [True, False], ids=["program", "module"])
def test_the_chain_is_found_again(layer: nn.Module, lifted: bool) -> None:
    """In the graph as it is emitted, and as it is after an export."""
    size = {nn.Linear: (2, 50), nn.Conv1d: (2, 16, 9)}.get(
        type(layer), (2, layer.weight.shape[type(layer) is nn.Conv2d], 9, 9)
    )
    x = torch.randn(size)
    graph = int4_graph(layer, (x,))
    if lifted:
        program = capture(graph, (x,)).program
        graph, names = program.graph_module, program.graph_signature.inputs_to_buffers
        found = [
            find_int4(node, lambda each: program.state_dict.get(names.get(each.name, ""))) for node in graph.graph.nodes
        ]
    else:
        stored = graph.state_dict()
        found = [find_int4(node, lambda each: stored.get(str(each.target))) for node in graph.graph.nodes]
    weights = [each for each in found if each is not None and each.shape == layer.weight.shape]
    assert weights
    values, scale = quantize_groups(layer.weight)
    expected = dequantize_groups(values, scale, 32).view(layer.weight.shape)
    assert torch.equal(weights[-1].dequantized(), expected)
    assert weights[-1].group_size == 32
    assert weights[-1].length == layer.weight[0].numel()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(QuantizeError, match="4 bits.*-8 ... 7.*-9 ... 3"):
        pack_int4(torch.tensor([[-9, 3]]), 2)
    with pytest.raises(QuantizeError, match="group_size.*even.*got 3"):
        pack_int4(torch.tensor([[1, 2]]), 3)
    with pytest.raises(QuantizeError, match="bits.*2 to 8.*group_size.*at least 1.*1 and 32"):
        quantize_groups(torch.randn(2, 4), bits=1)
