"""Sensitivity of parts: their points are those of the part alone on its calls, or the metric of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslim as ts
from tests.support.parted import Branching, TiedToTheRest, Translator, generation_task, seeded, task
from torchslim.core.part_calls import recorded
from torchslim.errors import SelectError, SensitivityError
from torchslim.training.calibration import CalibrationData


def measured(model: nn.Module, data: ts.Task, folder: Path, **options: Any) -> dict[tuple[str, str], float | None]:
    result = ts.sensitivity(model, data, workdir=folder, ratios=(0.5,), **options)
    return {(point.name, point.change): point.value for point in result.points}


@pytest.mark.slow
def test_the_points_of_a_part_are_those_of_the_part_alone(tmp_path: Path) -> None:
    model, data = seeded(Branching), task()
    points = measured(model, data, tmp_path, part="neck", schemes=("int8-dynamic",))
    calls = recorded(model, data, ["neck"], CalibrationData(data, 0).batches)["neck"]
    alone = ts.Task(val=calls, calibration=calls, metric=lambda *_: 0.0, inputs=lambda call: call)
    expected = measured(model.neck, alone, tmp_path, schemes=("int8-dynamic",))
    assert points == {(f"neck.{name}", change): value for (name, change), value in expected.items()}
    assert {name for name, _ in points} >= {"neck.0", "neck.2"}


@pytest.mark.slow
def test_the_metric_of_a_part_is_that_of_the_whole_model_with_the_change(tmp_path: Path) -> None:
    model: Any = seeded(Translator)
    data = generation_task()
    result = ts.sensitivity(
        model, data, workdir=tmp_path, ratios=(), schemes=("int4-weights", "int8-weights"), measure="metric",
        part="encoder", include="encoder.0",
    )  # fmt: skip
    metric = data.as_metric().fn
    batches = list(data.val)
    assert result.reference == metric(model, batches)
    assert {point.name for point in result.points} == {"encoder.0"}
    for point in result.points:
        bits = 4 if "int4" in point.change else 8
        changed = ts.quantize.weights(
            model, {"source": batches[0][0], "target": batches[0][1]}, bits=bits, part="encoder", runtime="onnxruntime",
            layers={"encoder.2": "float"}, checks=None,
            batches=[{"source": source, "target": target} for source, target in batches],
        )  # fmt: skip
        with torch.no_grad():
            assert point.value == pytest.approx(metric(changed, batches))


def test_weights_that_a_part_shares_stay(tmp_path: Path) -> None:
    x = [torch.randn(6, 8) for _ in range(3)]
    data = ts.Task(val=x, calibration=x, metric=lambda predict, batches: float(sum(predict(b).sum() for b in batches)),
                   inputs=lambda batch: (batch,))  # fmt: skip
    points = measured(seeded(TiedToTheRest), data, tmp_path, part="part", schemes=())
    assert set(points) == {("part.2.weight[0]", "50 %")}, (
        "the first layer is used elsewhere, the last one gives the outputs"
    )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"part": "nek"}, SelectError, ("'nek'", "neck")),
        ({"part": "neck", "measure": "kl"}, SensitivityError, ("kl", "whole models", "'sqnr'")),
        ({"part": "neck", "include": "low"}, SensitivityError, ("include='low'", "'neck'")),
    ],
)
def test_wrong_arguments_are_named(options: Any, error: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        ts.sensitivity(seeded(Branching), task(), workdir=tmp_path, **options)
    assert all(word in str(caught.value) for word in words), caught.value
