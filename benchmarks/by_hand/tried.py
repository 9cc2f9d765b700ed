"""Calls that guides of the other libraries show and a user tries first; their errors go into the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fasterai.core.criteria import large_final
from fasterai.core.schedule import one_cycle
from fasterai.prune.all import PruneCallback, Pruner
from fasterai.quantize.all import QuantizeCallback
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from benchmarks.by_hand import images_fasterai, sentences_fasterai, series_fasterai

Attempts = dict[str, Callable[[], object]]
Batches = Iterable[Any]


class NothingRemoved(RuntimeError):
    """A pruner returned without an error and without an effect."""


def images_with_fasterai(model: nn.Module, train: Batches, val: Batches, folder: Path) -> Attempts:
    """Pruning without an example, and training for int8."""
    dls = DataLoaders(images_fasterai.loader(train), images_fasterai.loader(val), device="cpu")
    learn = Learner(dls, deepcopy(model), loss_func=CrossEntropyLossFlat(), path=folder)
    pruning = PruneCallback(0.3, one_cycle, "global", large_final)
    return {
        "`PruneCallback` without `example_inputs`": lambda: learn.fit(1, cbs=[pruning]),
        "`QuantizeCallback(backend='pt2e')`, the only training for int8 that it exports": lambda: learn.fit(
            1, cbs=[QuantizeCallback(backend="pt2e")]
        ),
    }


def sentences_by_hand(model: nn.Module, train: Batches, val: Batches, folder: Path) -> Attempts:
    """Pruning as for BERT in the examples, and quantization of the optimized file."""

    def pruned() -> str:
        smaller = without_heads(deepcopy(model), _inputs(next(iter(val))), 0.25)
        with torch.no_grad():
            hits = [(smaller(**_inputs(batch)).logits.argmax(1) == batch["labels"]).float() for batch in val]
        return f"no error; {100 * float(torch.cat(hits).mean()):.2f} % on val without training"

    return {
        "Torch-Pruning's example for BERT, a quarter of heads and dimensions": pruned,
        "`quantize_dynamic` of the optimized model, without `DefaultTensorType`": lambda: quantize_dynamic(
            str(folder / "optimized.onnx"), str(folder / "tried.onnx"), per_channel=True, weight_type=QuantType.QInt8
        ),
    }


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def without_heads(model: nn.Module, example: dict[str, Tensor], ratio: float) -> nn.Module:
    """The model without a share of heads and dimensions; changed in place.

    Source: Torch-Pruning, examples/transformers/prune_hf_bert.py.
    """
    attentions = [module for module in model.modules() if isinstance(module, BertSelfAttention)]
    heads = {part: layer.num_attention_heads for layer in attentions for part in (layer.query, layer.key, layer.value)}
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=ratio,
        num_heads=heads,
        prune_num_heads=True,
        head_pruning_ratio=ratio,
        output_transform=lambda output: output.logits.sum(),
        ignored_layers=[model.classifier],
    )
    pruner.step()
    for layer in attentions:
        layer.num_attention_heads = pruner.num_heads[layer.query]
        layer.attention_head_size = layer.query.out_features // layer.num_attention_heads
        layer.all_head_size = layer.query.out_features
    return model


def sentences_with_fasterai(model: nn.Module, train: Batches, val: Batches, folder: Path) -> Attempts:
    """Pruning of a model with two inputs."""
    inputs = _inputs(next(iter(val)))

    def pruned() -> str:
        alone = sentences_fasterai.Logits(deepcopy(model))
        pruner = Pruner(alone, 0.25, "local", large_final, example_inputs=inputs["input_ids"])
        pruner.prune_model()
        with torch.no_grad():
            hits = [(alone(batch["input_ids"]).argmax(1) == batch["labels"]).float() for batch in val]
        return f"no error; {100 * float(torch.cat(hits).mean()):.2f} % on val without training"

    return {
        "`Pruner` of the model with its two inputs": lambda: Pruner(
            deepcopy(model), 0.25, "local", large_final, example_inputs=inputs
        ),
        "`Pruner` of the model as a function of one tensor": pruned,
    }


def series_by_hand(model: nn.Module, train: Batches, val: Batches, folder: Path) -> Attempts:
    """Pruning of an LSTM, and the export that is PyTorch's default."""
    series, lengths, _ = next(iter(val))

    def pruned() -> None:
        smaller = deepcopy(model)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        ignored = [smaller.head]
        example = (series, lengths)
        tp.pruner.BasePruner(smaller, example, importance, pruning_ratio=0.3, ignored_layers=ignored).step()
        _check_removed(model.lstm, smaller.lstm)

    free = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")}, {0: torch.export.Dim("batch")})
    return {
        "Torch-Pruning of the LSTM": pruned,
        "`torch.onnx.export` with `dynamo=True`, the default": lambda: torch.onnx.export(
            deepcopy(model), (series, lengths), folder / "tried.onnx", dynamic_shapes=free
        ),
    }


def series_with_fasterai(model: nn.Module, train: Batches, val: Batches, folder: Path) -> Attempts:
    """Pruning of an LSTM with two inputs."""
    series, lengths, _ = next(iter(val))

    def pruned() -> None:
        alone = series_fasterai.Padded(deepcopy(model))
        padded = series_fasterai.serve([series, lengths])[0]
        Pruner(alone, 0.3, "local", large_final, example_inputs=padded).prune_model()
        _check_removed(model.lstm, alone.model.lstm)

    return {
        "`Pruner` of the model with its two inputs": lambda: Pruner(
            deepcopy(model), 0.3, "local", large_final, example_inputs=(series, lengths)
        ),
        "`Pruner` of the model as a function of one tensor": pruned,
    }


def _check_removed(before: nn.LSTM, after: nn.LSTM) -> None:
    if before.weight_hh_l0.shape == after.weight_hh_l0.shape:
        raise NothingRemoved(f"the LSTM still has {after.weight_hh_l0.shape[1]} hidden units")


ATTEMPTS: Mapping[str, Callable[[nn.Module, Batches, Batches, Path], Attempts]] = {
    "images_fasterai": images_with_fasterai,
    "sentences": sentences_by_hand,
    "sentences_fasterai": sentences_with_fasterai,
    "series": series_by_hand,
    "series_fasterai": series_with_fasterai,
}
