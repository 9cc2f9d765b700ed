"""Padding of features: which mask of a batch applies to a network's positions, and how it maps to them.

A run on shorter sequences decides which mask belongs to a feature, if any. Equal lengths do not decide it where an
encoder and a decoder, or text and images, go through one network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchslim.core.batches import LABELS, Batch
from torchslim.core.task import Task
from torchslim.core.trees import changed
from torchslim.distill.features.align import Shape, resized_mask

DECODER = "decoder_"  # prefix of the decoder's inputs in batches of Hugging Face
DECODER_MASK = f"{DECODER}attention_mask"


@dataclass(frozen=True, slots=True)
class Padding:
    """Mapping of a mask of a batch to a feature's positions.

    Attributes:
        mask: number of the mask in `masks_of`.
        extra: number of positions before the first one of the mask, such as a class token, which count; None if a
            position covers several of the mask, as after a stride, or a part of one.
    """

    mask: int
    extra: int | None

    def over(self, masks: Sequence[Tensor | None], positions: Sequence[int]) -> Tensor | None:
        """Mask (batch, *positions), True where any of the positions that one covers counts; None without a mask."""
        mask = masks[self.mask]
        if mask is None:
            return None
        mask = mask.bool()
        if self.extra:
            mask = torch.cat([mask.new_ones(len(mask), self.extra), mask], 1)
        return resized_mask(mask, positions)


def masks_of(task: Task, batch: Batch) -> list[Tensor | None]:
    """The task's mask, and the decoder's if the batch has a separate one."""
    mask = task.mask(batch)
    decoder_mask = batch.get(DECODER_MASK) if isinstance(batch, Mapping) else None
    return [mask] if decoder_mask is None or decoder_mask is mask else [mask, decoder_mask]


def shorter(task: Task, batch: Batch, number: int) -> Any:
    """Inputs with about half of the positions of mask `number` in `masks_of`; None if they cannot be shortened."""
    mask, inputs = masks_of(task, batch)[number], task.inputs(batch)
    if mask is None or mask.dim() != 2 or mask.shape[1] < 3:
        return None
    cut = _cut(len(mask), mask.shape[1], _shortened(mask.shape[1]))
    if not isinstance(inputs, Mapping):
        return changed(inputs, cut)
    decodes = isinstance(batch, Mapping) and mask is batch.get(DECODER_MASK)
    return {
        name: value if name in LABELS or name.startswith(DECODER) != decodes else changed(value, cut)
        for name, value in inputs.items()
    }


def _shortened(length: int) -> int:
    return length // 2 + 1


def _cut(samples: int, length: int, new_length: int) -> Callable[[Tensor], Tensor]:
    """Function that cuts sequences: floats along dimension 1 only, others, such as masks, along all later ones too."""

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or len(tensor) != samples:
            return tensor
        for dim in (1,) if tensor.is_floating_point() else range(1, tensor.dim()):
            if tensor.shape[dim] == length:
                tensor = tensor.narrow(dim, 0, new_length)
        return tensor

    return cut


def fewer(inputs: Any, samples: int) -> tuple[Any, int]:
    """Inputs with another number of samples, about half of them, and this number."""
    count = samples // 2 + 1 if samples > 2 else samples + 1
    rows = torch.arange(count) % samples

    def chosen(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.dim() and len(tensor) == samples else tensor

    return changed(inputs, chosen), count


def find_padding(masks: Sequence[Tensor | None], positions: Shape, at: Sequence[Shape | None]) -> Padding | None:
    """Padding of a feature by the mask that applies to its positions; None if no mask does.

    Args:
        masks: of the batch.
        positions: of the feature.
        at: positions of the feature in the run on `shorter` sequences of each mask; None without such a run.
    """
    for number, (mask, short) in enumerate(zip(masks, at, strict=True)):
        if mask is None or mask.dim() - 1 != len(positions):
            continue
        mask_positions = tuple(mask.shape[1:])
        if short is None:
            if positions == mask_positions:
                return Padding(number, 0)
            if len(mask_positions) > 1:
                return Padding(number, None)
        elif short != positions:
            extra = positions[0] - mask_positions[0]
            return Padding(number, extra if extra >= 0 and short[0] - _shortened(mask_positions[0]) == extra else None)
    return None
