"""Buckets: the sizes of which a program is made each, where a size cannot vary; and padding to the next larger one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchslim.core.isolation import unfused_attention, untouched
from torchslim.errors import ExportError
from torchslim.graph.calling import Flat

Place = tuple[int, int]  # the index of a flat input or output, and a dimension
NEAR = {"rtol": 1e-4, "atol": 1e-5}  # float errors of an output that padding does not change
MOST = 64  # programs


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How inputs are padded to a bucket, and the outputs cut again.

    Attributes:
        fills: the values that are appended, by place of the buckets: 0, or 1 for a mask that is True at padding.
        outputs: dimensions of the flat outputs that have the size of the input.
    """

    fills: tuple[int, ...]
    outputs: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes of programs.

    Attributes:
        places: the dimensions of flat inputs whose sizes are listed.
        sizes: the sizes of each program, by place.
    """

    places: tuple[Place, ...]
    sizes: tuple[tuple[int, ...], ...]

    @property
    def one_length(self) -> bool:
        """Whether all places have the same size in each bucket, as the inputs of a sentence have."""
        return all(len(set(sizes)) == 1 for sizes in self.sizes)

    def guards(self, padding: Padding | None) -> list[str]:
        """Relations of the sizes that a call may have, as of `size_guards`."""
        names = [f"s{index}_{dim}" for index, dim in self.places]
        if not self.one_length:
            fits = [[f"{name} == {size}" for name, size in zip(names, sizes, strict=True)] for sizes in self.sizes]
            return [" or ".join(f"({' and '.join(part)})" for part in fits)]
        lengths = [sizes[0] for sizes in self.sizes]
        same = [f"{one} == {other}" for one, other in pairwise(names)]
        if padding is not None:
            return [f"{names[0]} <= {max(lengths)}", *same]
        return [" or ".join(f"{names[0]} == {length}" for length in lengths), *same]


def listed_buckets(dynamic_shapes: Any) -> dict[str, dict[int, list[int]]] | None:
    """Return the sizes of an argument such as `{"images": {2: [320, 480]}}`, by input and dimension; None for others.

    Raises:
        ExportError: sizes that are no whole numbers above 0, or lists of several lengths.
    """
    if not isinstance(dynamic_shapes, Mapping) or not dynamic_shapes:
        return None
    by_input = dynamic_shapes.values()
    if not all(isinstance(dims, Mapping) and dims and all(map(_listed, dims.items())) for dims in by_input):
        return None  # another specification
    buckets = {
        str(name): {int(dim): list(sizes) for dim, sizes in dims.items()} for name, dims in dynamic_shapes.items()
    }
    lists = [sizes for dims in buckets.values() for sizes in dims.values()]
    if any(type(size) is not int or size < 1 for sizes in lists for size in sizes):
        raise ExportError(f"dynamic_shapes must list sizes that are whole numbers from 1, got {dynamic_shapes}")
    if len({len(sizes) for sizes in lists}) > 1 or not 1 <= len(lists[0]) <= MOST:
        raise ExportError(
            f"dynamic_shapes must list as many sizes for every dimension, from 1 to {MOST}: the first program has the "
            f"first size of each, the second one the second; got {dynamic_shapes}"
        )
    return buckets


def _listed(entry: tuple[Any, Any]) -> bool:
    """Whether an entry is a dimension and sizes; a recipe writes the dimension as a text."""
    dim, sizes = entry
    return re.fullmatch(r"-?\d{1,3}", str(dim)) is not None and isinstance(sizes, (list, tuple)) and bool(sizes)


def with_size(leaf: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with `size` values along a dimension, again from the first one where there are fewer."""
    return leaf.index_select(dim, (torch.arange(size) % max(leaf.shape[dim], 1)).to(leaf.device))


def resized_to(leaves: Sequence[Tensor], places: Sequence[Place], sizes: Sequence[int]) -> list[Tensor]:
    """Flat inputs with these sizes."""
    resized = list(leaves)
    for (index, dim), size in zip(places, sizes, strict=True):
        resized[index] = with_size(resized[index], dim, size)
    return resized


def padded(leaves: Sequence[Tensor], places: Sequence[Place], size: int, fills: Sequence[int]) -> list[Tensor]:
    """Flat inputs with values appended at the places until they have `size`."""
    result = list(leaves)
    for (index, dim), fill in zip(places, fills, strict=True):
        leaf = result[index]
        shape = [*leaf.shape]
        shape[dim] = size - shape[dim]
        result[index] = torch.cat([leaf, leaf.new_full(shape, fill)], dim)
    return result


def proved_padding(flat: Flat, leaves: Sequence[Tensor], buckets: Buckets) -> Padding | None:
    """How to pad shorter inputs, if the model's own results do not change by it; None if they do.

    The model runs on inputs of up to three sizes below each bucket, and on the same inputs padded to the bucket: the
    outputs must be equal, apart from positions that the padding has added.
    """
    if not buckets.one_length:
        return None
    masks = [leaves[index].dtype == torch.bool for index, _ in buckets.places]
    for fills in dict.fromkeys([(0,) * len(masks), tuple(map(int, masks))]):
        with untouched(flat.model), unfused_attention(), torch.no_grad():
            outputs = _unchanged(flat, leaves, buckets, fills)
        if outputs is not None:
            return Padding(fills=fills, outputs=outputs)
    return None


def _unchanged(
    flat: Flat, leaves: Sequence[Tensor], buckets: Buckets, fills: Sequence[int]
) -> tuple[Place, ...] | None:
    """The output dimensions to cut, where padding with these values changes nothing else."""
    lengths = sorted(sizes[0] for sizes in buckets.sizes)
    cuts: set[tuple[Place, ...]] = set()
    for below, length in pairwise([0, *lengths]):
        for size in {below + 1, (below + length) // 2, length - 1}:
            if not below < size < length:
                continue
            short = _shortened(leaves, buckets.places, size)
            try:
                expected, answers = flat(*short), flat(*padded(short, buckets.places, length, fills))
            except Exception:  # noqa: BLE001 - the model does not run at this size, so that nothing is proved
                return None
            cut = _cut(expected, answers, size, length)
            if cut is None:
                return None
            cuts.add(cut)
    return cuts.pop() if len(cuts) == 1 else None


def _shortened(leaves: Sequence[Tensor], places: Sequence[Place], size: int) -> list[Tensor]:
    """Flat inputs of a smaller size; whole numbers elsewhere, such as lengths of sequences, are at most that size."""
    short = resized_to(leaves, places, [size] * len(places))
    sized = {index for index, _ in places}
    return [
        leaf if index in sized or leaf.is_floating_point() or leaf.dtype == torch.bool else leaf.clamp(max=size)
        for index, leaf in enumerate(short)
    ]


def _cut(expected: Sequence[Tensor], answers: Sequence[Tensor], size: int, length: int) -> tuple[Place, ...] | None:
    """The dimensions of outputs that the padding has made longer; None where other values differ."""
    cut: list[Place] = []
    for index, (right, answer) in enumerate(zip(expected, answers, strict=True)):
        if right.dim() != answer.dim():
            return None
        longer = [dim for dim in range(right.dim()) if right.shape[dim] != answer.shape[dim]]
        if any((right.shape[dim], answer.shape[dim]) != (size, length) for dim in longer):
            return None
        for dim in longer:
            answer = answer.narrow(dim, 0, size)
        if not torch.allclose(right.double(), answer.double(), equal_nan=True, **NEAR):
            return None
        cut += [(index, dim) for dim in longer]
    return tuple(cut)
