"""Distillation on the device gives what distillation on the CPU gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import torchslim as ts
from tests.support import toy
from tests.support.gpu import CPU, assert_moved, assert_near, context, other_model, taken, task_on
from torchslim.core.trees import device_of

BASE: dict[str, Any] = {"epochs": 2, "optimizer": "sgd", "lr": 0.02, "clip_norm": 1.0}
TAPS = {"conv1": "conv1", "conv2": "conv2"}
LOSSES: dict[str, dict[str, Any]] = {
    **{f"response {name}": {"response": name} for name in ("kd", "dkd", "dist", "mse")},
    **{f"feature {name}": {"feature": name, "taps": TAPS} for name in ("hint", "attention_transfer", "fsp", "vid")},
    "feature by rule": {"feature": "hint"},
    **{
        f"relation {name}": {"relation": name}
        for name in ("rkd", "similarity_preserving", "pkt", "correlation_congruence")
    },
    "all kinds": {"response": "kd", "feature": "hint", "relation": "rkd", "taps": TAPS},
    "moving average": {"teacher": "ema"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_give_the_weights_of_the_cpu(name: str, device: torch.device) -> None:
    step = ts.Distill(**BASE | {"label_weight": 1.0} | LOSSES[name])
    here, there = (taken(step, place) for place in (device, CPU))
    assert_moved(there.model)
    assert_near(here.model, there.model, tolerance=1e-2)  # losses of features and relations are large at first
    for row, other in zip(here.history, there.history, strict=True):
        assert row == pytest.approx(other, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("model_there", [False, True], ids=["model on CPU", "model on device"])
@pytest.mark.parametrize("teacher_there", [False, True], ids=["teacher on CPU", "teacher on device"])
@pytest.mark.parametrize("batches_there", [False, True], ids=["batches on CPU", "batches on device"])
def test_teacher_student_and_batches_may_be_apart(
    model_there: bool, teacher_there: bool, batches_there: bool, device: torch.device
) -> None:
    home, school = (device if there else CPU for there in (model_there, teacher_there))
    teacher, model = other_model().to(school), toy.model().to(home)
    step = ts.Distill(**BASE, feature="hint", relation="rkd", teacher=teacher, label_weight=1.0)
    outcome = step(model, context(device, model, task=task_on(device if batches_there else CPU)))
    assert device_of(outcome.model).type == home.type
    assert device_of(teacher).type == school.type  # the user's own, which a step only reads
    expected = taken(replace(step, teacher=other_model()), CPU)
    assert_near(outcome.model, expected.model, tolerance=1e-2)


def test_answers_that_the_cpu_cached_are_read_on_the_device(device: torch.device, tmp_path: Path) -> None:
    """And the other way round; the outputs are the same up to rounding."""
    step = ts.Distill(**BASE, feature="hint", cache=tmp_path)
    task = toy.task()
    there = taken(step, CPU, task=task)
    files = sorted(path.name for path in tmp_path.iterdir())
    here = taken(step, device, task=task)
    assert files
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert_near(here.model, there.model, tolerance=1e-2)


def test_contrast_keeps_its_banks_on_the_device(device: torch.device) -> None:
    step = ts.Distill(**BASE, relation=ts.distill.CRD(size=8), label_weight=1.0)
    outcome = taken(step, device, task=toy.task())
    # with all samples as negatives nothing is drawn, so the CPU computes the same
    expected = taken(step, CPU, task=toy.task())
    assert_near(outcome.model, expected.model, tolerance=1e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_distills(precision: str, device: torch.device) -> None:
    if precision == "bf16-mixed" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bfloat16")
    engine = ts.Engine(accelerator=device.type, precision=precision)
    step = ts.Distill(**BASE, feature="hint", relation="rkd", label_weight=1.0)
    here, there = taken(step, device, engine=engine), taken(step, CPU)
    assert_moved(here.model)
    assert_near(here.model, there.model, tolerance=0.1)
