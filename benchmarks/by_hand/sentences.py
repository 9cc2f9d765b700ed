"""Sentences by hand: exported, fused by ONNX Runtime's optimizer for transformers, quantized dynamically.

Sources: ONNX Runtime's pages on transformers (optimize first) and on quantization, which recommends dynamic
quantization for them, with weights of 7 bits on processors without VNNI, whose sums of products of 8 bits saturate.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model
from torch import Tensor, nn

Batches = Iterable[dict[str, Tensor]]


class Logits(nn.Module):
    """The model as a function of two tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (batch, classes) of token ids and mask, both (batch, steps)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, epochs: int, folder: Path) -> Path:
    """The path of the quantized model."""
    model = deepcopy(model).eval()
    model.set_attn_implementation("eager")
    batch = next(iter(val))
    exported, optimized, quantized = (str(folder / f"{name}.onnx") for name in ("float", "optimized", "int8"))
    torch.onnx.export(
        Logits(model),
        (batch["input_ids"], batch["attention_mask"]),
        exported,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_axes={name: {0: "batch", 1: "steps"} for name in ("input_ids", "attention_mask")},
        opset_version=17,
        dynamo=False,
    )
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    optimize_model(exported, model_type="bert", num_heads=heads, hidden_size=width).save_model_to_file(optimized)
    quantize_dynamic(
        optimized,
        quantized,
        per_channel=True,
        reduce_range="vnni" not in Path("/proc/cpuinfo").read_text(),
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    return Path(quantized)
