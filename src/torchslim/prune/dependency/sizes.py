"""Makes inputs of a second size, and carries a removal over to a trace at that size.

Which channels are coupled may depend on free sizes: a reshape that mixes positions with channels couples four channels
at one size, and six at another. A removal must be right at both sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchslim.core.step import Inputs
from torchslim.prune.dependency.coupling import Coupling, Mask
from torchslim.prune.dependency.trace import Trace
from torchslim.prune.dependency.union_find import Ids

LARGE = 96
"""From this extent on, the second size is below the first one, because it is cheaper."""

FEW = 3
"""The second size of a larger batch; the second size of a batch of up to `FEW` samples has one more."""


def other_inputs(inputs: Inputs) -> Iterator[Inputs]:
    """Yield inputs of other sizes, the most informative first; the model may accept none of them.

    Only one of two equal extents changes, so that height and width can be told apart. Elements are repeated, so that
    indices stay in their ranges.
    """
    flat, spec = tree_flatten(inputs)
    shapes = [tuple(leaf.shape) for leaf in flat if isinstance(leaf, Tensor) and leaf.dim()]
    if not shapes:
        return
    batch = shapes[0][0] if len({shape[0] for shape in shapes}) == 1 else 0

    def resized(changes: dict[tuple[int, int], int]) -> Inputs:
        """The inputs with new sizes; `changes` maps (dimension, size) to the new size, -1 being the last dimension."""
        leaves: list[Any] = []
        for leaf in flat:
            if isinstance(leaf, Tensor):
                for (dim, size), new in changes.items():
                    if -leaf.dim() <= dim < leaf.dim() and leaf.shape[dim] == size:
                        leaf = leaf.index_select(dim, torch.arange(new, device=leaf.device) % size)
            leaves.append(leaf)
        resized_inputs: Inputs = tree_unflatten(leaves, spec)
        return resized_inputs

    extents = [key for key in _extents(flat) if key[1] > 1]
    other_batch = {(0, batch): FEW if batch > FEW else batch + 1} if batch else {}
    for key in extents:
        for new in _near(key[1]):
            yield resized({key: new} | other_batch)
    for key in extents if other_batch else ():
        yield resized({key: _near(key[1])[0]})
    if other_batch:
        yield resized(other_batch)


def _extents(flat: list[Any]) -> list[tuple[int, int]]:
    """Dimensions that may be free, with sizes: the last of images and signals, the second of sequences."""
    extents: dict[tuple[int, int], None] = {}
    for leaf in sorted((tensor for tensor in flat if isinstance(tensor, Tensor)), key=lambda tensor: -tensor.dim()):
        floating = leaf.is_floating_point() or leaf.is_complex()
        if leaf.dim() > 2 and floating:
            extents[-1, leaf.shape[-1]] = None
        if leaf.dim() == 3 or (leaf.dim() == 2 and not floating):
            extents[1, leaf.shape[1]] = None
    return list(extents)


def _near(size: int) -> tuple[int, ...]:
    """Two sizes with other factors than `size`, the preferred one first."""
    less, more = max(size * 3 // 4, 1), size * 3 // 2 if size > 2 else size + 1
    return (less, more) if size >= LARGE else (more, less)


def carried(coupling: Coupling, removed: Mask, other: Trace) -> tuple[Coupling, Mask, list[tuple[Ids, str]]]:
    """The coupling at another size, the removal at that size, and the atoms for which it fails there, with reasons.

    The atoms of weights come first in every trace of a model, so both traces number them alike.
    """
    atoms = copy.deepcopy(other.tagger.atoms)
    other_coupling = Coupling(other, atoms, [], [])
    weights = np.unique(
        np.concatenate([core.numpy().reshape(-1) for weight in other.weights.values() for core in weight.layers])
    )
    removed_weights = removed[coupling.roots[weights]]
    roots = other_coupling.roots[weights]
    total, lost = (np.bincount(roots, counted, atoms.count) for counted in (np.ones(len(roots)), removed_weights))
    removed_there = lost > 0
    mismatched = np.zeros(atoms.count, dtype=bool)
    for derived in other.tagger.derived:
        targets, sources = other_coupling.roots[derived.targets], other_coupling.roots[derived.sources]
        all_sources = np.asarray(removed_there[sources].all(1))
        free = total[targets] == 0
        removed_there[targets[free]] |= all_sources[free]
        wrong = ~free & (all_sources != removed_there[targets])  # a sum goes exactly when all its parts go
        mismatched[targets[wrong]] = True
        mismatched[sources[wrong].reshape(-1)] = True
    frozen = atoms.frozen()[roots] > 0
    conflicting = removed_weights & ((lost < total)[roots] | frozen | mismatched[roots])
    removed_there.setflags(write=False)
    conflicts = [(weights[conflicting & ~frozen], "")] if (conflicting & ~frozen).any() else []
    for root in np.unique(roots[conflicting & frozen]):
        conflicts.append((weights[conflicting & frozen & (roots == root)], atoms.why(np.array([root]))))
    return other_coupling, removed_there, conflicts
