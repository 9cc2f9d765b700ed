"""Series with torchslim: the step of the gallery's recipe, an LSTM on integers.

Nothing is removed from the LSTM: the accuracy of pruned and distilled ones differs by points between seeds, and the 54
series of val are too few to choose a share and a training.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

import torchslim as ts

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, seed: int, folder: Path) -> Path:
    """The path of the quantized model."""
    task = ts.Task(train=train, val=val, metric="accuracy")
    return ts.compress(model, task, [ts.Quantize("int8-dynamic")], threads=1, seed=seed).save(folder) / "model.onnx"
