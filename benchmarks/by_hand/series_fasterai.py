"""Series with fasterai: its export with dynamic int8, of one input of one length.

Source: fasterai's tutorial on the export to ONNX. Its pruner and export take one tensor a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from fasterai.export.all import export_onnx
from torch import Tensor, nn

STEPS = 29  # of every series: the export fixes the length of its example
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


class Padded(nn.Module):
    """The model as a function of one tensor: a series, padded, whose last column holds its length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, padded: Tensor) -> Tensor:
        """Logits (batch, speakers) of series (batch, steps, channels + 1)."""
        return self.model(padded[:, :, :-1], padded[:, 0, -1].long())


def serve(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Series and lengths as one tensor of the only length that the file takes."""
    series, lengths = inputs
    column = lengths.view(-1, 1, 1).expand(-1, STEPS, 1).float()
    return [torch.cat([torch.nn.functional.pad(series, (0, 0, 0, STEPS - series.shape[1])), column], 2)]


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, epochs: int, folder: Path) -> Path:
    """The path of the quantized model."""
    series, lengths, _ = next(iter(val))
    example = serve([series[:1], lengths[:1]])[0]
    model = Padded(deepcopy(model).eval())
    return export_onnx(model, example, folder / "model.onnx", quantize=True, quantize_mode="dynamic")
