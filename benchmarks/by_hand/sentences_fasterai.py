"""Sentences with fasterai: its export with dynamic int8, of one input of one length.

Source: fasterai's tutorial on the export to ONNX. Its pruner, callbacks and export take one tensor a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from fasterai.core.criteria import large_final
from fasterai.export.all import export_onnx
from fasterai.prune.all import Pruner
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


def attempts(model: nn.Module, train: Batches, val: Batches, folder: Path) -> dict[str, Callable[[], object]]:
    """Calls of the guides that a user tries first."""
    batch = next(iter(val))
    example = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids = example["input_ids"]

    def pruned() -> None:
        pruner = Pruner(Logits(deepcopy(model)), 0.25, "local", large_final, example_inputs=ids)
        pruner.prune_model()
        pruner.model(ids)

    return {
        "Pruner of the model with its two inputs": lambda: Pruner(
            deepcopy(model), 0.25, "local", large_final, example_inputs=example
        ),
        "Pruner of the model as a function of one tensor": pruned,
    }


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, epochs: int, folder: Path) -> Path:
    """The path of the quantized model."""
    model = deepcopy(model).eval()
    example = torch.ones(1, STEPS, dtype=torch.long)
    return export_onnx(Logits(model), example, folder / "model.onnx", quantize=True, quantize_mode="dynamic")
