"""A quantized model's program comes from its own capture, and is the program that an export would give."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import toy
from tests.support.deployment_models import architectures, resize
from torchslim.core.batches import call
from torchslim.graph.export import Captured, capture
from torchslim.graph.lifting import lifted
from torchslim.quantize import convert, prepare
from torchslim.runtimes import find_runtime

ARCHITECTURES = {
    name: made for name, made in architectures().items() if any(weight.dim() > 1 for weight in made[0].parameters())
}
UNREAD = ("getitem", "_assert_tensor_metadata")  # an export drops outputs of a layer that nothing reads, and asserts


def quantized(model: nn.Module, inputs: Any, scheme: str = "int8", **options: Any) -> Any:
    prepared = prepare(model, inputs, scheme=scheme, **options)
    prepared.calibrate([inputs])
    return convert(prepared, checks=None)


def operations(captured: Captured) -> Counter[str]:
    names = (str(node.target) for node in captured.program.graph.nodes if node.op == "call_function")
    return Counter(name for name in names if not any(unread in name for unread in UNREAD))


def kinds(captured: Captured) -> list[tuple[str, str | None]]:
    signature = captured.program.graph_signature
    return sorted((str(spec.kind), spec.target) for spec in signature.input_specs)


@pytest.mark.parametrize("scheme", ["int8", "int8-weights"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_lifted_program_is_the_exported_one(name: str, scheme: str) -> None:
    model, inputs = ARCHITECTURES[name]
    result = quantized(model, inputs, scheme)
    ours, theirs = lifted(result, inputs, "batch"), capture(result, inputs)
    assert ours is not None
    assert operations(ours) == operations(theirs)
    assert kinds(ours) == kinds(theirs)
    assert (ours.names, ours.inputs, ours.outputs) == (theirs.names, theirs.inputs, theirs.outputs)
    assert ours.batch_axis == theirs.batch_axis
    shapes = [[str(value.shape) for value in each.inputs_of_program()] for each in (ours, theirs)]
    assert [shape.count("s") for shape in shapes[0]] == [shape.count("s") for shape in shapes[1]]
    runtime = find_runtime("eager")
    other = inputs if ours.batch_axis is None else resize(inputs, 3)
    answers = [runtime.compile(each, source=result, threads=1) for each in (ours, theirs)]
    for one, two in zip(*(each.run(each.spec.leaves(*_arguments(other))) for each in answers), strict=True):
        assert torch.equal(one, two)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def test_the_files_are_the_same_bytes() -> None:
    x = toy.images(4, 0)[0]
    result = quantized(toy.model(), (x,))
    runtime = find_runtime("onnxruntime")
    ours = lifted(result, (x,), "batch")
    assert ours is not None
    lifted_bytes = runtime.compile(ours, source=result).payload
    assert lifted_bytes == runtime.compile(capture(result, (x,)), source=result).payload


def test_weights_are_no_part_of_what_is_carried_and_programs_share_none() -> None:
    x = toy.images(4, 0)[0]
    result = quantized(toy.model(), (x,))
    frame = result.origin.frame.program
    assert not frame.state_dict
    assert not frame.constants
    program = lifted(result, (x,), "batch").program  # type: ignore[union-attr]
    before = call(result, (x,)).clone()
    for weight in program.state_dict.values():
        weight.data.zero_()
    assert torch.equal(call(result, (x,)), before)


@pytest.mark.parametrize(("inputs", "shapes"), [
    ((torch.randn(2, 3, 20, 20),), "batch"),  # another image size than the captured one
    ((torch.randn(2, 3, 16, 16, dtype=torch.float64),), "batch"),
    ((torch.randn(2, 3, 16, 16),), None),
    ((torch.randn(2, 3, 16, 16),), ({0: torch.export.Dim.DYNAMIC},)),
])  # fmt: skip
def test_what_does_not_fit_the_capture_is_exported(inputs: Any, shapes: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    result = quantized(model, (torch.randn(2, 3, 16, 16),))
    assert lifted(result, (torch.randn(5, 3, 16, 16),), "batch") is not None
    assert lifted(result, inputs, shapes) is None


def test_copies_keep_the_capture_and_pickles_lose_it() -> None:
    x = toy.images(4, 0)[0]
    result = quantized(toy.model(), (x,))
    assert lifted(copy.deepcopy(result), (x,), "batch") is not None
    assert pickle.loads(pickle.dumps(result.origin)) is None


def test_a_model_captured_with_a_fixed_batch_is_lifted_with_it() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).view(2, 8).softmax(-1)

    x = torch.randn(2, 2, 4)
    result = quantized(Fixed().eval(), (x,))
    ours = lifted(result, (x,), "batch")
    assert ours is not None
    assert ours.batch_axis is None
    assert ours.notes == result.origin.frame.notes
    assert torch.allclose(find_runtime("onnxruntime").compile(ours, source=result)(x), call(result, (x,)), atol=1e-5)
