"""Sentences with fasterai: its export with dynamic int8, of one input of one length.

Source: fasterai's tutorial on the export to ONNX. Its pruner, callbacks and export take one tensor a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from fasterai.export.all import export_onnx
from torch import Tensor, nn

STEPS = 64  # of every sentence: the export fixes the length of its example
Batches = Iterable[dict[str, Tensor]]


class Logits(nn.Module):
    """The model as a function of one tensor, whose zeros are padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, classes) of token ids (batch, steps)."""
        return self.model(input_ids=input_ids, attention_mask=(input_ids != 0).long()).logits


def serve(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The token ids, padded to the only length that the file takes."""
    ids = inputs[0]
    return [torch.nn.functional.pad(ids, (0, STEPS - ids.shape[1]))]


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, epochs: int, folder: Path) -> Path:
    """The path of the quantized model."""
    model = deepcopy(model).eval()
    example = torch.ones(1, STEPS, dtype=torch.long)
    return export_onnx(Logits(model), example, folder / "model.onnx", quantize=True, quantize_mode="dynamic")
