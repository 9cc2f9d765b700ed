"""Layers: integer tensors that say with which atoms the elements of a value are removed.

An atom is one index of one dimension of a weight, such as a channel of a convolution, as an integer. (A layer here is
a tensor of atoms, not a module.) `propagation` explains by an example how operations carry layers along.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchslim.prune.dependency.union_find import Ids

Layers = tuple[Tensor, ...]
Shape = Sequence[int]
Operand = tuple[Layers, Shape]
"""A value's layers and its shape."""

JointKey = tuple[tuple[int, ...], bytes]
"""Identifies a joint layer: its shape without dimensions of size 1, and its atoms as bytes."""


def varying(layer: Tensor) -> frozenset[int]:
    """Dimensions along which a layer varies."""
    return frozenset(dim for dim, size in enumerate(layer.shape) if size > 1)


def compressed(layer: Tensor) -> Tensor:
    """The layer with size 1 along every dimension in which all its atoms are the same."""
    for dim, size in enumerate(layer.shape):
        if size > 1:
            first = layer.narrow(dim, 0, 1)
            if layer.stride(dim) == 0 or bool((layer == first).all()):
                layer = first
    return layer


def align(operand: Operand, rank: int) -> Operand:
    """The operand with dimensions of size 1 in front, as broadcasting adds them to reach `rank` dimensions."""
    layers, shape = operand
    aligned = tuple(layer.reshape((1,) * (rank - layer.dim()) + tuple(layer.shape)) for layer in layers)
    return aligned, (1,) * (rank - len(shape)) + tuple(shape)


def spread(operand: Operand, own_labels: str, labels: Sequence[str]) -> Operand:
    """The operand with one dimension for each of `labels`, of size 1 for labels that it does not have.

    `own_labels` names the operand's dimensions, a letter for each, as in einsum.
    """
    layers, shape = operand
    sizes = dict(zip(own_labels, shape, strict=True))
    order = [own_labels.index(label) for label in labels if label in sizes]
    index = tuple(slice(None) if label in sizes else None for label in labels)
    return tuple(layer.permute(order)[index] for layer in layers), [sizes.get(label, 1) for label in labels]


def restrict(layer: Tensor, labels: Sequence[str], out: str) -> Tensor:
    """The layer with the dimensions of `out` alone, in its order; the other labels' dimensions must have size 1."""
    kept = [label for label in labels if label in out]
    squeezed = layer.reshape([layer.shape[labels.index(label)] for label in kept])
    return squeezed.permute([kept.index(label) for label in out])


def repetition(layer: Tensor) -> bytes:
    """The pattern of equal atoms in a layer, whatever these atoms are: `[7, 7, 9]` and `[2, 2, 5]` have the same."""
    _, first, inverse = np.unique(layer.numpy().reshape(-1), return_index=True, return_inverse=True)
    pattern: bytes = first[inverse.reshape(-1)].tobytes()
    return pattern


def joint_key(layer: Tensor) -> tuple[Ids, JointKey]:
    """The atoms of a layer without its dimensions of size 1, and the key that identifies them."""
    array = layer.numpy()
    shape = tuple(size for size in array.shape if size > 1)
    array = np.ascontiguousarray(array).reshape(shape)
    return array, (shape, array.tobytes())


def flat(layer: Tensor) -> Ids:
    """The atoms of a layer in one dimension."""
    atoms: Ids = np.ascontiguousarray(layer.numpy()).reshape(-1)
    return atoms


def joined(parts: Sequence[Tensor], lengths: Sequence[int], dim: int) -> Tensor:
    """Layers of concatenated values, one for each, as one layer; `lengths` are the values' sizes along `dim`."""
    sizes = [max(layer.shape[index] for layer in parts) for index in range(parts[0].dim())]
    expanded = [
        layer.expand([*sizes[:dim], length, *sizes[dim + 1 :]]) for layer, length in zip(parts, lengths, strict=True)
    ]
    return compressed(torch.cat(expanded, dim))
