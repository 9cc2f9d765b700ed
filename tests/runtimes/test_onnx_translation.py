"""Translation to ONNX node by node: the exporter's own result, without its trace of the whole program."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchslim.core.isolation import quiet
from torchslim.graph.export import Captured, capture, module_of
from torchslim.graph.io_structure import flatten
from torchslim.runtimes import onnx_translation
from torchslim.runtimes.onnx_translation import to_onnx_program


class Convolutions(nn.Module):
    """Normalized convolutions with activations in place and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.group, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.first(x)), inplace=True)
        y = F.hardswish(self.group(self.second(x)))
        y += x
        return self.head(F.dropout(F.adaptive_avg_pool2d(y, 1).flatten(1), 0.1, self.training, inplace=True))


class Attention(nn.Module):
    """A masked transformer layer on whole numbers, with sums of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + torch.arange(tokens.shape[1])[:, None] * 2 + (tokens > 3)[..., None]
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        return self.layer(x, src_mask=mask).mean(1)


class Recurrent(nn.Module):
    """Two directions of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


MODELS = {
    "convolutions": (Convolutions, lambda: torch.randn(2, 3, 8, 8)),
    "attention": (Attention, lambda: torch.randint(0, 20, (2, 7))),
    "recurrent": (Recurrent, lambda: torch.randn(2, 9, 6)),
}


def run(exported, captured: Captured) -> list[Tensor]:
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    leaves = flatten(captured.inputs, captured.example)
    feeds = {value.name: leaf.numpy() for value, leaf in zip(session.get_inputs(), leaves, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feeds)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gives_what_the_exporter_gives_without_calling_it(name, monkeypatch):
    """Fails on the day that a private part of the exporter changes: then every program would take the slow way."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    captured = capture(make().eval(), (inputs(),))
    with quiet():
        theirs = torch.onnx.export(captured.program, dynamo=True, verbose=False, optimize=True, external_data=False)
        monkeypatch.setattr(torch.onnx, "export", None)
        ours = to_onnx_program(captured.program, {})
    expected = module_of(captured.program)(*flatten(captured.inputs, captured.example))
    for value, other, right in zip(run(ours, captured), run(theirs, captured), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)
    counts = [Counter(node.op_type for node in program.model.graph) for program in (ours, theirs)]
    heavy = ("Conv", "Gemm", "MatMul", "LSTM", "Softmax", "BatchNormalization", "LayerNormalization", "Clip")
    assert {kind: counts[0][kind] for kind in heavy} == {kind: counts[1][kind] for kind in heavy}


def test_a_program_with_a_graph_inside_goes_through_the_exporter(monkeypatch):
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    called = []
    monkeypatch.setattr(torch.onnx, "export", lambda program, **options: called.append(program))
    captured = capture(Branch(), (torch.randn(2, 2),), None)
    notes: list[str] = []
    to_onnx_program(captured.program, {}, notes)
    assert called == [captured.program]
    assert len(notes) == 1
    assert "is a graph inside the program" in notes[0]


def test_an_error_of_another_kind_is_not_hidden_behind_the_slow_way(monkeypatch):
    def broken(*args):
        raise KeyError("a fault of our own")

    monkeypatch.setattr(onnx_translation, "decompose_nodes", broken)
    captured = capture(nn.Linear(2, 2), (torch.randn(2, 2),), None)
    with pytest.raises(KeyError, match="a fault of our own"):
        to_onnx_program(captured.program, {})


LATE = """
import torch, torchslim as ts
from torch import nn
model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
ts.deploy(model, (x,))  # builds the registry
def refused(*args, **kwargs):
    raise AssertionError("the whole program was traced again")
torch.onnx.export = refused
ts.deploy(ts.quantize.static(model, [(x,)]), (x,))  # imports the quantized operations
"""


@pytest.mark.slow  # 8 s: a process of its own
def test_operations_that_are_registered_later_are_translated() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
