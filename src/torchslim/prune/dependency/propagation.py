"""How atoms, the ids of channels, travel through operations.

Each index of each dimension of a weight is an *atom*. Each value of the run carries *layers*: integer tensors of atoms
with the value's dimensions, of size 1 where the atoms do not vary. An element is removed when its atom in any layer is.
For linear layers `a (4, 3)` and `b (2, 4)` and an input `x (3,)`:

    a           has the layers [[1], [2], [3], [4]] for its rows and [[5, 6, 7]] for its columns
    b           has the layers [[8], [9]] and [[10, 11, 12, 13]]
    h = a @ x   x has no atoms, so its size is fixed and 5, 6, 7 must stay; h has the layer [1, 2, 3, 4]
    y = b @ h   `contract` couples 10-1, 11-2, 12-3 and 13-4 and sums over them; y has the layer [8, 9]

So a row of `a` and a column of `b` go together. Layout operations are applied to the layers themselves: `h.view(2, 2)`
has the *joint* layer [[1, 2], [3, 4]]. It must stay rectangular, so it can lose whole rows or whole columns; `resolve`
chooses which. A sum over its columns leaves a *derived* atom for each row, which goes exactly when the whole row goes.

`layers` holds functions of one layer, `constraints` records what a run finds, and `merging` couples elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from torchslim.prune.dependency.constraints import Constraints
from torchslim.prune.dependency.layers import (
    JointKey,
    Layers,
    Operand,
    Shape,
    compressed,
    joined,
    restrict,
    spread,
    varying,
)
from torchslim.prune.dependency.merging import merged
from torchslim.prune.dependency.union_find import KEPT

__all__ = ["JointKey", "Layers", "Operand", "Tagger", "compressed", "varying"]


class Tagger(Constraints):
    """The operations on layers from which the rules of all operations are made.

    Each method takes the layers of an operation's inputs, records the constraints between their atoms, and returns the
    layers of its output.
    """

    def merge(self, operands: Sequence[Operand], shape: Shape) -> Layers:
        """Elementwise, with broadcasting to `shape`: layers that vary along the same dimensions are coupled.

        A dimension that one operand has atoms for and another spans without any is of a fixed size, and freezes them.
        """
        return merged(self, operands, len(shape))

    def reduce(self, layers: Layers, dims: Iterable[int]) -> Layers:
        """Sum over `dims`, which stay as dimensions of size 1."""
        summed = frozenset(dims)
        projected = [self.onto(layer, varying(layer) - summed) for layer in layers if not varying(layer) <= summed]
        return tuple(layer for layer in projected if not any(self.implies(other, layer) for other in projected))

    def along(self, layers: Layers, dims: Iterable[int], why: str = "positions along space stay") -> Layers:
        """Mix neighbors along `dims`, as a convolution does: no layer may vary along them afterwards.

        A layer along these dimensions alone stays; one that varies along others too is coupled across positions.
        """
        mixed = frozenset(dims)
        result = []
        for layer in layers:
            mixed_dims = varying(layer) & mixed
            if not mixed_dims:
                result.append(layer)
            elif mixed_dims == varying(layer):
                self.freeze([layer], why)
            else:
                first = layer
                for dim in mixed_dims:
                    first = first.narrow(dim, 0, 1)
                self.atoms.union(layer.numpy(), first.numpy())
                result.append(first)
        return tuple(result)

    def layout(self, layers: Layers, shape: Shape, move: Callable[[Tensor], Tensor]) -> Layers:
        """Apply a layout operation, such as a view or a slice, to the layers of a value of this shape."""
        moved = [compressed(move(layer.expand(*shape) if len(shape) else layer)) for layer in layers]
        self.freeze((layer for layer in moved if not varying(layer)), "a single one is taken")
        return self.note(tuple(layer for layer in self._without_redundant_elastic(moved) if varying(layer)))

    def _without_redundant_elastic(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """The layers without elastic ones along dimensions that others vary along.

        An expanded dimension that is folded into one with atoms adapts by itself; its own atoms would couple too much.
        """
        is_elastic = [self.atoms.is_elastic(layer.numpy()) for layer in layers]
        firm_dims = [varying(layer) for layer, elastic in zip(layers, is_elastic, strict=True) if not elastic]
        return [
            layer
            for layer, elastic in zip(layers, is_elastic, strict=True)
            if not (elastic and any(varying(layer) & dims for dims in firm_dims))
        ]

    def contract(self, operands: Sequence[tuple[Layers, Shape, str]], out: str) -> Layers:
        """Products summed over shared labels, as in einsum: merge in the space of all labels, then reduce.

        Each operand is (layers, shape, one label per dimension).
        """
        labels = list(dict.fromkeys("".join(own_labels for _, _, own_labels in operands)))
        labeled = [spread((layers, shape), own_labels, labels) for layers, shape, own_labels in operands]
        products = merged(self, labeled, len(labels))
        sums = self.reduce(products, [dim for dim, label in enumerate(labels) if label not in out])
        return self.note(tuple(restrict(layer, labels, out) for layer in sums))

    def join(self, operands: Sequence[Operand], dim: int) -> Layers:
        """Concatenate along `dim`: layers along it are joined, those across it are merged."""
        if not any(layers for layers, _ in operands):
            return ()
        rank = len(operands[0][1])
        lengths = [shape[dim] for _, shape in operands]
        across = [
            (tuple(layer for layer in layers if dim not in varying(layer)), (*shape[:dim], 1, *shape[dim + 1 :]))
            for layers, shape in operands
        ]
        result = list(self.merge(across, np.broadcast_shapes(*(shape for _, shape in across))))
        inside = [[layer for layer in layers if dim in varying(layer)] for layers, _ in operands]
        without = torch.full([1] * rank, KEPT)  # stands for the layer of an operand that has none along `dim`
        for slot in range(max(map(len, inside))):
            parts = [layers[slot] if slot < len(layers) else without for layers in inside]
            layer = joined(parts, lengths, dim)
            if varying(layer):
                result.append(layer)
        return self.note(tuple(result))
