"""Models, teachers and students in half precision."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8)


RUNTIMES = ["eager", "onnxruntime", "openvino"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "runtime"),
    [*itertools.product((torch.float16, torch.bfloat16), RUNTIMES), (torch.float64, "eager")],
)
def test_a_model_of_another_precision_is_quantized(dtype: torch.dtype, runtime: str) -> None:
    model = net().to(dtype)
    batches = [(images().to(dtype),) for _ in range(2)]
    deployed = ts.deploy(ts.quantize.static(model, batches, runtime=runtime), batches[0], runtime=runtime)
    other = images(3).to(dtype)
    found = deployed(other)
    assert found.dtype == dtype
    assert ts.quantize.sqnr(model(other), found) > 20
    assert next(model.parameters()).dtype == dtype  # the caller's


class Mixed(nn.Module):
    """Whole numbers in, a bfloat16 and a float32 output, a bfloat16 constant, and a cast of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.linear(self.embedding(tokens).mean(1)) * torch.full((4,), 0.5, dtype=torch.bfloat16)
        return {"scores": (y.float() * 3).softmax(-1), "raw": (y.float() + 1).to(torch.bfloat16) * scale}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_model_in_bfloat16_is_deployed_and_saved(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed().bfloat16().eval()
    inputs = (torch.randint(10, (3, 5)), torch.rand(3, 1).bfloat16())
    deployed = ts.deploy(model, inputs, runtime=runtime)
    expected, found = model(*inputs), deployed(*inputs)
    assert {name: each.dtype for name, each in found.items()} == {name: each.dtype for name, each in expected.items()}
    assert found["raw"].dtype == torch.bfloat16
    assert ts.quantize.sqnr(expected, found) > 35
    loaded = ts.load(ts.save(deployed, tmp_path / "a"))(*inputs)
    assert all(torch.equal(loaded[name], found[name]) and loaded[name].dtype == found[name].dtype for name in found)
    assert ts.load(tmp_path / "a", runtime="onnxruntime")(*inputs)["raw"].dtype == torch.bfloat16


def test_weights_of_several_types_are_refused() -> None:
    model = net()
    model[4].half()
    with pytest.raises(ts.TorchslimError, match=r"several types \(float16, float32\); quantize model\.float\(\)"):
        ts.quantize.prepare(model, (images(),))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"feature": ts.distill.Hint(), "response": None}], ids=["response", "feature"])
def test_a_teacher_may_have_another_precision(dtype: torch.dtype, options: dict[str, Any]) -> None:
    data = [(images(8), torch.randint(5, (8,))) for _ in range(2)]
    task = ts.Task(train=data, val=data, metric="accuracy")
    result = ts.compress(net(), task, [ts.Distill(epochs=1, teacher=net().to(dtype), **options)], runtime="eager")
    history = result.run["rows"][1]["history"]
    assert all(0 <= value < 100 for value in history[0].values() if isinstance(value, float))


@pytest.mark.slow
def test_a_student_in_bfloat16_learns_from_a_float_teacher() -> None:
    data = [(images(8).bfloat16(), torch.randint(5, (8,))) for _ in range(2)]
    task = ts.Task(train=data, val=data, metric="accuracy")
    result = ts.compress(net().bfloat16(), task, [ts.Distill(epochs=1, teacher=net())], runtime="eager")
    assert next(result.module.parameters()).dtype == torch.bfloat16
