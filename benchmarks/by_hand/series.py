"""Series by hand: an LSTM with packed sequences, exported and quantized dynamically.

Source: ONNX Runtime's page on quantization, which recommends dynamic quantization for recurrent models,
and weights of 7 bits on processors without VNNI, whose sums of products of 8 bits saturate.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


def run(model: nn.Module, train: Batches, val: Batches, calibration: Batches, epochs: int, folder: Path) -> Path:
    """The path of the quantized model."""
    series, lengths, _ = next(iter(val))
    exported, prepared, quantized = (str(folder / f"{name}.onnx") for name in ("float", "prepared", "int8"))
    torch.onnx.export(
        deepcopy(model).eval(),
        (series, lengths),
        exported,
        input_names=["series", "lengths"],
        output_names=["logits"],
        dynamic_axes={"series": {0: "batch", 1: "steps"}, "lengths": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    quant_pre_process(exported, prepared)
    seven_bits = "vnni" not in Path("/proc/cpuinfo").read_text()
    quantize_dynamic(prepared, quantized, per_channel=True, reduce_range=seven_bits, weight_type=QuantType.QInt8)
    return Path(quantized)
