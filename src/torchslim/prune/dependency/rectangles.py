"""Joint layers as arrays of atoms: whether a removal leaves one rectangular, and slices of which axis should go.

In the layer [[1, 2, 3], [4, 5, 6]] the slices along axis 0 are its rows, and those along axis 1 its columns. It stays
rectangular if every row is one class, or every column: then whole slices go. Frozen slices need not be one class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchslim.prune.dependency.union_find import Atoms, Ids


def slices(array: NDArray[Any], axis: int) -> NDArray[Any]:
    """The slices of an array along an axis, one in each row."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def couple_slices(atoms: Atoms, layer: Ids, axis: int) -> None:
    """Make every slice along `axis` one class."""
    rows = slices(layer, axis)
    atoms.union(rows, rows[:, :1])


def is_rectangular(atoms: Atoms, layer: Ids) -> bool:
    """Does every removal leave the layer rectangular: is each slice along some axis one class, or frozen?"""
    classes = atoms.find(layer)
    frozen = atoms.frozen()[classes] > 0
    if frozen.all():
        return True
    for axis in range(layer.ndim):
        rows = slices(classes, axis)
        is_one_class = (rows == rows[:, :1]).all(1)
        if (is_one_class | slices(frozen, axis).all(1)).all():
            return True
    return False


def best_axis(atoms: Atoms, layer: Ids, shut: set[int]) -> int:
    """The axis, not in `shut`, that leaves the most classes free when its slices are coupled; then the longest."""
    classes, numbers = np.unique(atoms.find(layer), return_inverse=True)
    frozen = atoms.frozen()[classes] > 0
    numbers = numbers.reshape(layer.shape)
    open_axes = [axis for axis in range(layer.ndim) if axis not in shut]
    return max(open_axes, key=lambda axis: (_free_classes(numbers, frozen, axis), layer.shape[axis]))


def _free_classes(numbers: Ids, frozen: NDArray[np.bool_], axis: int) -> int:
    """How many classes can be removed once the slices along `axis` are coupled, tried on atoms of its own."""
    trial = Atoms()
    ids = trial.fresh(len(frozen))
    trial.freeze(ids[frozen], "stays")
    couple_slices(trial, ids[numbers], axis)
    classes = np.unique(trial.find(ids))
    return int((trial.frozen()[classes] == 0).sum())
