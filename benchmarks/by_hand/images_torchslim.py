"""Images with torchslim: the steps of the gallery's recipe. Its four epochs are in the steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

import torchslim as ts

Batches = Iterable[tuple[Tensor, Tensor]]


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, seed: int, folder: Path) -> Path:
    """The path of the quantized model."""
    task = ts.Task(train=train, val=val, calibration=calibration, metric="accuracy")
    steps = [
        ts.Prune(sparsity=0.5, of="macs", pattern="channel", criterion="lamp", normalization="max"),
        ts.Distill(epochs=3, optimizer="sgd", lr=0.01, weight_decay=5e-4),
        ts.Quantize("int8", mode="qat", train=ts.Distill(epochs=1, lr=1e-4)),
    ]
    return ts.compress(model, task, steps, threads=1, seed=seed).save(folder) / "model.onnx"
