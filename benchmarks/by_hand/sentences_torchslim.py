"""Sentences with torchslim: the step of the gallery's recipe, integers with ranges from training sentences."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

import torchslim as ts

Batches = Iterable[dict[str, Tensor]]


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, seed: int, folder: Path) -> Path:
    """The path of the quantized model."""
    task = ts.Task(train=train, val=val, metric="accuracy")
    quantize = ts.Quantize("int8", layers={"type:Embedding": "int8-weights"})
    return ts.compress(model, task, [quantize], threads=1, seed=seed).save(folder) / "model.onnx"
