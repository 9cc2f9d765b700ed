"""Decomposition of single nodes: the same values, no changes in place, or a refusal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from torchslim.graph.decompose_nodes import NotLocal, decompose_nodes
from torchslim.graph.export import capture, module_of

aten = torch.ops.aten
TABLE = torch._decomp.core_aten_decompositions()
# operations on one of the tensors so far: in place, views, results that may be their input, new tensors
OPERATIONS = {
    "relu_": lambda x: x.relu_(),
    "add_": lambda x: x.add_(1.0),
    "mul_": lambda x: x.mul_(x),
    "fill row": lambda x: x[..., :1].fill_(0.5),
    "write row": lambda x: x[..., :2].copy_(x[..., 2:4] * 2),
    "view": lambda x: x.view(x.shape[0], 2, -1),
    "flat": lambda x: x.flatten(1),
    "transpose": lambda x: x.transpose(-1, -2),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "same type": lambda x: x.type_as(x),
    "to": lambda x: x.to(torch.float32),
    "contiguous": lambda x: x.contiguous(),
    "half": lambda x: x.chunk(2, -1)[1],
    "new": lambda x: x * 1.5,
    "norm": lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
}


class Steps(nn.Module):
    """Applies operations to tensors made before, and returns all tensors."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> list[Tensor]:
        made = [x + 0]
        for name, place in self.steps:
            made.append(OPERATIONS[name](made[place % len(made)]))
        return [tensor.flatten() * 1 for tensor in made]


def known(node: Node) -> bool:
    """No in-place operation, and none of those that tests take apart."""
    return node.target not in (aten.dropout.default, aten.flatten.using_ints, aten.layer_norm.default, aten.to.dtype)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 5)), min_size=1, max_size=6))
def test_a_decomposed_program_computes_the_same_or_is_refused(steps):
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    model = Steps(steps)
    try:
        expected = model(x.clone())
        program = capture(model, (x,), None).program
    except Exception:  # noqa: BLE001 - these steps are no model: a view of tensors that are not contiguous, for example
        return
    try:
        result = decompose_nodes(program, known, TABLE)
    except NotLocal:
        assert any(name in ("relu_", "add_", "mul_", "fill row", "write row") for name, _ in steps)
        return
    for node in result.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            assert not node.target._schema.is_mutable
            assert known(node)
    for ours, theirs in zip(module_of(result)(x.clone()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_an_activation_in_place_is_replaced_and_the_program_is_not_modified():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU6(inplace=True), nn.Dropout(0.5, inplace=True), nn.Linear(4, 2)
    ).eval()
    program = capture(model, (torch.randn(2, 4),)).program
    before = program.graph_module.code
    result = decompose_nodes(program, known, TABLE)
    assert program.graph_module.code == before
    targets = {node.target for node in result.graph.nodes}
    assert aten.hardtanh.default in targets
    assert not {aten.hardtanh_.default, aten.dropout_.default, aten.dropout.default} & targets
    x = torch.randn(5, 4)
    torch.testing.assert_close(module_of(result)(x)[0], model(x))


def test_a_free_batch_stays_free():
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(x.flatten(0, 1)[:, None], 1).flatten(1)

    program = capture(Pool(), (torch.randn(2, 3, 4, 4),)).program
    result = decompose_nodes(program, lambda node: "pool" not in str(node.target), TABLE)
    x = torch.randn(7, 3, 4, 4)
    torch.testing.assert_close(module_of(result)(x)[0], Pool()(x))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_program_that_changes_its_state_is_refused():
    program = torch.export.export(Counter(), (torch.randn(2),)).run_decompositions({})
    with pytest.raises(NotLocal, match="changes inputs or buffers"):
        decompose_nodes(program, known, TABLE)


def test_an_operation_without_a_decomposition_is_refused():
    program = capture(nn.Linear(2, 2), (torch.randn(2, 2),)).program
    with pytest.raises(NotLocal, match="no decomposition"):
        decompose_nodes(capture(nn.Conv1d(1, 1, 1), (torch.randn(2, 1, 2),)).program, lambda node: False, {})
    assert decompose_nodes(program, lambda node: node.target is aten.linear.default, {})
