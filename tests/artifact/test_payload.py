"""What a file of a quantized model holds: the stored bits, and no float copy of a quantized weight."""

from __future__ import annotations

import functools
import io
import zipfile
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support.quantized_graphs import stored_bits
from torchslim.quantize import SCHEMES, convert, prepare

BYTES = {"int8": 0.26, "int8-dynamic": 0.26, "int8-weights": 0.26, "int4-weights": 0.17}
"""Of the float weights: a quarter, or an eighth and the scale of each group of 32; and biases."""
SMALL = 3000  # scales of activations and the like


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 128, 3)
        self.hidden, self.head = nn.Linear(2048, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(torch.relu(self.norm(self.stem(x)))))
        x = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


class Rec(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(64, 192, 2, batch_first=True)
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


MODELS: dict[str, Any] = {
    "conv": lambda: (Net(), torch.randn(4, 3, 12, 12)),
    "lstm": lambda: (Rec("LSTM"), torch.randn(4, 4, 64)),
    "gru": lambda: (Rec("GRU"), torch.randn(4, 4, 64)),
}


def onnx_bytes(graph: Any) -> int:
    """Of all tensors of a graph, constants and branches included."""
    total = sum(onnx.numpy_helper.to_array(each).nbytes for each in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                total += onnx.numpy_helper.to_array(attribute.t).nbytes
            elif attribute.type == onnx.AttributeProto.GRAPH:
                total += onnx_bytes(attribute.g)
    return total


def tensor_bytes(runtime: str, payload: bytes) -> int:
    if runtime == "onnxruntime":
        return onnx_bytes(onnx.load_from_string(payload).graph)
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        files = {each.filename: each.file_size for each in archive.infolist()}
    return sum(size for name, size in files.items() if not name.endswith((".json", ".xml")))


@functools.cache
def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return model.eval(), x


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "eager", "openvino"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_holds_the_stored_bits(name: str, scheme: str, runtime: str) -> None:
    model, x = network(name)
    prepared = prepare(model, (x,), runtime=runtime, scheme=scheme)
    if scheme == "int8":
        prepared.calibrate([(x,)])
    quantized = convert(prepared)
    deployed = ts.deploy(quantized, (x,), runtime=runtime)
    floats = sum(each.numel() * each.element_size() for each in model.parameters())
    recurrent = name != "conv"  # recurrent layers have 8 bits in every scheme
    held = stored_bits(quantized) / 8
    assert held <= BYTES["int8" if recurrent else scheme] * floats * (1.05 if recurrent else 1) + SMALL
    assert deployed.payload is not None
    assert tensor_bytes(runtime, deployed.payload) <= 1.02 * held + SMALL
