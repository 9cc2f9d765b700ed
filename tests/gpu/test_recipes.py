"""Whole recipes with the model on the device and batches on the CPU, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import torchslim as ts
from tests.support import toy
from tests.support.gpu import CPU, engine_of, task_on
from torchslim.core.trees import device_of

TRAIN: dict[str, Any] = {"epochs": 2, "optimizer": "sgd", "lr": 0.02}
STEPS = [
    ts.Prune(pattern="channel", of="channels", sparsity=0.25, round_to=1, min_channels=1, criterion="taylor"),
    ts.Prune(sparsity=0.3, criterion="wanda"),
    ts.Distill(**TRAIN, feature="hint", relation="rkd", accumulate=2, average=0.9),
    ts.Quantize(mode="qat", train=ts.Finetune(epochs=1, optimizer="sgd", lr=0.01)),
]


def run(home: torch.device, batches: torch.device, engine: ts.Engine, **options: Any) -> ts.Result:
    defaults: dict[str, Any] = {"runtime": "eager", "threads": 1, "seed": 3, "engine": engine}
    model = toy.model().to(home)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = ts.compress(model, task_on(batches), STEPS, **defaults | options)
    assert device_of(model).type == home.type
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return result


@pytest.fixture(scope="module")
def reference() -> ts.Result:
    """The same recipe on the CPU alone."""
    return run(CPU, CPU, engine_of(CPU))


@pytest.mark.parametrize("model_there", [False, True], ids=["model on CPU", "model on device"])
@pytest.mark.parametrize("batches_there", [False, True], ids=["batches on CPU", "batches on device"])
def test_a_recipe_gives_the_metrics_of_the_cpu(
    model_there: bool, batches_there: bool, device: torch.device, engine: ts.Engine, reference: ts.Result
) -> None:
    result = run(device if model_there else CPU, device if batches_there else CPU, engine)
    rows, others = result.run["rows"], reference.run["rows"]
    assert [row["name"] for row in rows] == [row["name"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row["parameters"]["value"] == other["parameters"]["value"]
        figures = [one["metric"]["test"]["value"] for one in (row, other)]
        assert figures[0] == pytest.approx(figures[1], abs=5)  # percent: three of 64 images
    images = toy.images(64, 5)[0]
    answer, expected = result.deployed(images.to(device)), reference.deployed(images)
    assert answer.device == CPU
    assert (answer.argmax(1) == expected.argmax(1)).double().mean() > 0.85


def test_a_run_that_the_device_began_ends_on_the_cpu(device: torch.device, engine: ts.Engine, tmp_path: Path) -> None:
    """Finished steps are read from the folder, whichever device made them."""
    first = run(device, CPU, engine, workdir=tmp_path)
    again = run(CPU, CPU, engine, workdir=tmp_path)
    images = toy.images(8, 5)[0]
    torch.testing.assert_close(again.deployed(images), first.deployed(images), rtol=0, atol=0)
