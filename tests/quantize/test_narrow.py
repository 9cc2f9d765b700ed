"""Linear layers whose input would take longer to round than the product in float: only their weights are integers."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch import nn

import torchslim as ts
from torchslim.quantize.backend_profiles import PROFILES

NARROW = PROFILES["onnxruntime"].narrow


def layers(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, outputs), nn.ReLU(), nn.Linear(outputs, 32)).eval()


@pytest.mark.parametrize(
    ("runtime", "outputs", "bits"),
    [("onnxruntime", NARROW, None), ("onnxruntime", NARROW + 1, 8), ("eager", 1, 8)],
)
def test_a_narrow_layer_keeps_float_activations(runtime: Any, outputs: int, bits: int | None) -> None:
    quantized: Any = ts.quantize.dynamic(layers(outputs), (torch.randn(4, 24),), runtime=runtime)
    records = {record.layer: record for record in quantized.records}
    assert (records["0"].weight_bits, records["0"].activation_bits) == (8, bits)
    assert (records["2"].weight_bits, records["2"].activation_bits) == (8, 8)
    assert (f"{outputs} outputs" in records["0"].reason) == (bits is None)


def test_static_ranges_cost_no_pass_over_the_input() -> None:
    quantized: Any = ts.quantize.static(layers(NARROW), [(torch.randn(4, 24),)], runtime="onnxruntime")
    assert {record.activation_bits for record in quantized.records} == {8}


def test_a_narrow_layer_is_stored_in_bytes_and_rounds_nothing() -> None:
    x = torch.randn(4, 24)
    deployed: Any = ts.deploy(ts.quantize.dynamic(layers(NARROW), (x,)), (x,), runtime="onnxruntime", threads=1)
    graph = onnx.load_from_string(deployed.payload).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 1
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 1]
    stored = {tuple(sorted(tensor.dims)): tensor.data_type for tensor in matrices}
    assert stored == dict.fromkeys([(NARROW, 24), (NARROW, 32)], onnx.TensorProto.INT8)
