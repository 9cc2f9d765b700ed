"""Sentences by hand: exported, fused by ONNX Runtime's optimizer for transformers, quantized dynamically.

Sources: ONNX Runtime's pages on transformers (optimize first) and on quantization, which recommends dynamic
quantization for them, with one scale a channel on processors with VNNI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path

import torch
import torch_pruning as tp
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention

Batches = Iterable[dict[str, Tensor]]


class Logits(nn.Module):
    """The model as a function of two tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (batch, classes) of token ids and mask, both (batch, steps)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def prune_heads(model: nn.Module, example: dict[str, Tensor], ratio: float) -> nn.Module:
    """Remove heads and dimensions as Torch-Pruning's example for BERT does."""
    heads = {}
    for module in model.modules():
        if isinstance(module, BertSelfAttention):
            for projection in (module.query, module.key, module.value):
                heads[projection] = module.num_attention_heads
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=ratio,
        num_heads=heads,
        prune_head_dims=False,
        prune_num_heads=True,
        head_pruning_ratio=ratio,
        output_transform=lambda output: output.logits.sum(),
        ignored_layers=[model.classifier],
    )
    pruner.step()
    for module in model.modules():
        if isinstance(module, BertSelfAttention):
            module.num_attention_heads = pruner.num_heads[module.query]
            module.attention_head_size = module.query.out_features // module.num_attention_heads
            module.all_head_size = module.query.out_features
    return model


def attempts(model: nn.Module, train: Batches, val: Batches, folder: Path) -> dict[str, Callable[[], object]]:
    """Calls of the guides that a user tries first."""
    batch = next(iter(val))
    example = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def pruned() -> None:
        smaller = prune_heads(deepcopy(model), example, 0.25)
        with torch.no_grad():
            hits = [(smaller(**{key: b[key] for key in example}).logits.argmax(1) == b["labels"]).float() for b in val]
        raise RuntimeError(f"no error; without training {100 * float(torch.cat(hits).mean()):.2f} % on val")

    return {"Torch-Pruning's example for BERT, a quarter of heads and dimensions": pruned}


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
    quantize_dynamic(optimized, quantized, per_channel=True, weight_type=QuantType.QInt8)
    return Path(quantized)
