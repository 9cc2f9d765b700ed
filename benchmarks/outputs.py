"""What of a model's outputs a benchmark compares, inputs of another batch size, and batch norms that fit the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.batches import call
from torchslim.training.batch_norm import recalibrate_batch_norm

# widths in the middle of a model, which pruning may change
INNER = ("hidden", "past", "cache", "model_output", "attentions")


def main_outputs(output: Any) -> list[Tensor]:
    """The tensors of an output in order, without hidden states and caches."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        kept = (value for key, value in output.items() if not any(part in str(key) for part in INNER))
        return [leaf for value in kept for leaf in main_outputs(value)]
    if isinstance(output, (tuple, list)):
        return [leaf for value in output for leaf in main_outputs(value)]
    return []


def shapes(output: Any) -> list[list[int]]:
    """The shapes of the main outputs; of a detector, which lists what it found, without how many it found."""
    found = isinstance(output, list) and output and isinstance(output[0], Mapping)
    return [list(leaf.shape[1:] if found else leaf.shape) for leaf in main_outputs(output)]


def repeated(inputs: Any, times: int) -> Any:
    """The same inputs with every sample `times` times over; lists are a batch of samples."""
    if isinstance(inputs, Tensor):
        return torch.cat([inputs] * times)
    if isinstance(inputs, Mapping):
        return {key: repeated(value, times) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(repeated(value, times) for value in inputs)
    return inputs * times if isinstance(inputs, list) else inputs


def stacked(batches: Any) -> Any:
    """Inputs of one structure as one batch; lists are a batch of samples."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches)) if first.dim() else first
    if isinstance(first, Mapping):
        return {key: stacked([each[key] for each in batches]) for key in first}
    if isinstance(first, tuple):
        return tuple(stacked(each) for each in zip(*batches, strict=True))
    return [each for batch in batches for each in batch] if isinstance(first, list) else first


def settle_norms(model: nn.Module, batches: Sequence[Any]) -> None:
    """Batch norms of a random network get the statistics of these inputs: activations then have sane ranges.

    Args:
        model: changed in place; one that takes no larger batch keeps the statistics that it has.
        batches: as the model takes them; they are given to it as one.
    """
    try:
        recalibrate_batch_norm(model, call, [stacked(batches)])
    except Exception:  # noqa: BLE001 - whatever a model says to another batch, its batch is fixed
        return
