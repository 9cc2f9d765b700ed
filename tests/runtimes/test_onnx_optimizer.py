"""The optimizer gives what the exporter's own gives, byte by byte."""

from __future__ import annotations

import pytest
import torch
from onnxscript.rewriter import pattern
from torch import Tensor, nn
from torch.nn import functional as F

from torchslim.core.isolation import quiet
from torchslim.graph.export import capture
from torchslim.runtimes.onnx_optimizer import optimize


class Many(nn.Module):
    """Operations that the rules rewrite: batch norms, pads, clips, casts, reshapes, transposes, halves and slices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.gate = nn.Conv2d(8, 8, 3, padding=1), nn.GLU(1)
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.first(F.pad(x, (1, 1, 1, 1))))).relu()
        x = self.gate(self.second(x)).clamp(min=-3).clamp(max=3)
        x = x.transpose(1, 2).transpose(1, 2).reshape(len(x), -1).reshape(len(x), 4, -1).mean(-1)
        words = self.embedding(tokens)
        state = words[:, 0]
        for step in range(1, 5):
            left, right = state.chunk(2, -1)
            state = torch.cat([right, left], -1) * 1.0 + words[:, step] + step
        return self.head(torch.cat([x, state.float() + 0], -1))


def exported():
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 8, 8), torch.randint(0, 10, (2, 5)))
    captured = capture(Many().eval(), inputs)
    with quiet():
        return torch.onnx.export(captured.program, dynamo=True, verbose=False, optimize=False, external_data=False)


@pytest.mark.slow  # 8 s: two exports
def test_gives_what_the_exporter_gives() -> None:
    ours, theirs = exported(), exported()
    before = len(ours.model.graph)
    optimize(ours.model)
    with quiet():
        theirs.optimize()
    assert len(ours.model.graph) < before
    made, expected = (one.model_proto.SerializeToString(deterministic=True) for one in (ours, theirs))
    assert made == expected


@pytest.mark.slow  # 4 s: an export
def test_looks_through_the_graph_for_slices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule with two results took time by the square of the number of nodes."""
    program, tried = exported(), []
    match = pattern.SimplePatternMatcher.match

    def counted(self, model, graph, node, **options):
        if not self.pattern.has_single_output_node:
            tried.append(node.op_type)
        return match(self, model, graph, node, **options)

    monkeypatch.setattr(pattern.SimplePatternMatcher, "match", counted)
    optimize(program.model)
    assert set(tried) <= {"Slice"}
