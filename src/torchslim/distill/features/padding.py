"""Which positions of a feature are padding: the masks of a batch, and how one lies over a network's positions.

Which of the masks is a feature's, if any, is found by a run on shorter sequences: where an encoder and a decoder, or
text and images, go through one network, equal lengths tell nothing.
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

DECODER = "decoder_"  # how Hugging Face's batches name what goes into a decoder
DECODER_MASK = f"{DECODER}attention_mask"


@dataclass(frozen=True, slots=True)
class Padding:
    """How a mask of a batch lies over positions.

    Attributes:
        mask: its number among `masks_of`.
        extra: positions before the first one of the mask, such as a class token, which count; None where a position
            stands for several, as behind a stride, or for a part of one.
    """

    mask: int
    extra: int | None

    def over(self, masks: Sequence[Tensor | None], positions: Sequence[int]) -> Tensor | None:
        """True where a position counts, if any that it stands for does: (batch, *positions); None without a mask."""
        mask = masks[self.mask]
        if mask is None:
            return None
        mask = mask.bool()
        if self.extra:
            mask = torch.cat([mask.new_ones(len(mask), self.extra), mask], 1)
        return resized_mask(mask, positions)


def masks_of(task: Task, batch: Batch) -> list[Tensor | None]:
    """The task's mask, and that of a decoder where a batch has one by itself."""
    mask = task.mask(batch)
    other = batch.get(DECODER_MASK) if isinstance(batch, Mapping) else None
    return [mask] if other is None or other is mask else [mask, other]


def shorter(task: Task, batch: Batch, number: int) -> Any:
    """The inputs with about half of the positions of one of `masks_of`; None where that cannot be had."""
    mask, inputs = masks_of(task, batch)[number], task.inputs(batch)
    if mask is None or mask.dim() != 2 or mask.shape[1] < 3:
        return None
    cut = _cut(len(mask), mask.shape[1], _shortened(mask.shape[1]))
    if not isinstance(inputs, Mapping):
        return changed(inputs, cut)
    decodes = isinstance(batch, Mapping) and mask is batch.get(DECODER_MASK)
    return {
        name: each if name in LABELS or name.startswith(DECODER) != decodes else changed(each, cut)
        for name, each in inputs.items()
    }


def _shortened(length: int) -> int:
    return length // 2 + 1


def _cut(samples: int, length: int, wanted: int) -> Callable[[Tensor], Tensor]:
    """Cuts sequences; floats are cut along their second dimension only, others, such as masks, along all of them."""

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or len(tensor) != samples:
            return tensor
        for dim in (1,) if tensor.is_floating_point() else range(1, tensor.dim()):
            if tensor.shape[dim] == length:
                tensor = tensor.narrow(dim, 0, wanted)
        return tensor

    return cut


def fewer(inputs: Any, samples: int) -> tuple[Any, int]:
    """The inputs with another number of samples, about half; and how many these are."""
    wanted = samples // 2 + 1 if samples > 2 else samples + 1
    rows = torch.arange(wanted) % samples

    def chosen(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.dim() and len(tensor) == samples else tensor

    return changed(inputs, chosen), wanted


def find_padding(masks: Sequence[Tensor | None], positions: Shape, at: Sequence[Shape | None]) -> Padding | None:
    """Which mask lies over these positions, and how; None where none does.

    Args:
        masks: of the batch.
        positions: of the feature.
        at: its positions in the run on `shorter` sequences of each mask; None without such a run.
    """
    for number, (mask, short) in enumerate(zip(masks, at, strict=True)):
        if mask is None or mask.dim() - 1 != len(positions):
            continue
        whole = tuple(mask.shape[1:])
        if short is None:
            if positions == whole:
                return Padding(number, 0)
            if len(whole) > 1:
                return Padding(number, None)
        elif short != positions:
            extra = positions[0] - whole[0]
            return Padding(number, extra if extra >= 0 and short[0] - _shortened(whole[0]) == extra else None)
    return None
