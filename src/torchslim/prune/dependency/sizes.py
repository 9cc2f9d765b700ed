"""A second size of the inputs, and what a removal means there.

Which channels go together may depend on sizes that are free: a reshape that mixes positions with channels couples
four of them at one size, and six at another. What is removed must be right at both.
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
"""From this extent on the second size is the smaller one, as it costs less."""


def other_inputs(inputs: Inputs) -> Iterator[Inputs]:
    """Inputs of other sizes, the most telling first; a model need not take any of them.

    Only one of two equal extents changes, so height and width are told apart; elements are repeated, so indices stay
    in their ranges.
    """
    flat, spec = tree_flatten(inputs)
    shapes = [tuple(leaf.shape) for leaf in flat if isinstance(leaf, Tensor) and leaf.dim()]
    if not shapes:
        return
    batch = shapes[0][0] if len({shape[0] for shape in shapes}) == 1 else 0

    def resized(changes: dict[tuple[int, int], int]) -> Inputs:
        """Every dimension counted by (from the front or the back, its size) with its new size."""
        leaves: list[Any] = []
        for leaf in flat:
            if isinstance(leaf, Tensor):
                for (dim, size), new in changes.items():
                    if -leaf.dim() <= dim < leaf.dim() and leaf.shape[dim] == size:
                        leaf = leaf.index_select(dim, torch.arange(new, device=leaf.device) % size)
            leaves.append(leaf)
        made: Inputs = tree_unflatten(leaves, spec)
        return made

    extents = [key for key in _extents(flat) if key[1] > 1]
    more = {(0, batch): batch + 1} if batch else {}
    for key in extents:
        for new in _near(key[1]):
            yield resized({key: new} | more)
    for key in extents if more else ():
        yield resized({key: _near(key[1])[0]})
    if more:
        yield resized(more)


def _extents(flat: list[Any]) -> list[tuple[int, int]]:
    """Dimensions that may be free: the last of images and signals, the second of sequences."""
    found: dict[tuple[int, int], None] = {}
    for leaf in sorted((each for each in flat if isinstance(each, Tensor)), key=lambda each: -each.dim()):
        floating = leaf.is_floating_point() or leaf.is_complex()
        if leaf.dim() > 2 and floating:
            found[-1, leaf.shape[-1]] = None
        if leaf.dim() == 3 or (leaf.dim() == 2 and not floating):
            found[1, leaf.shape[1]] = None
    return list(found)


def _near(size: int) -> tuple[int, ...]:
    """Sizes with other factors than this one."""
    less, more = max(size * 3 // 4, 1), size * 3 // 2 if size > 2 else size + 1
    return (less, more) if size >= LARGE or less == size else (more, less)


def carried(coupling: Coupling, removed: Mask, other: Trace) -> tuple[Coupling, Mask, list[tuple[Ids, str]]]:
    """A removal at another size: its atoms there, and where it is none, with the reasons.

    The atoms of weights are the first of every trace of a model, so both traces know them by the same numbers.
    """
    atoms = copy.deepcopy(other.tagger.atoms)
    there = Coupling(other, atoms, [], [])
    weights = np.unique(
        np.concatenate([core.numpy().reshape(-1) for weight in other.weights.values() for core in weight.layers])
    )
    gone = removed[coupling.roots[weights]]
    roots = there.roots[weights]
    total, lost = (np.bincount(roots, chosen, atoms.count) for chosen in (np.ones(len(roots)), gone))
    result = lost > 0
    unlike = np.zeros(atoms.count, dtype=bool)
    for each in other.tagger.derived:
        targets, sources = there.roots[each.targets], there.roots[each.sources]
        whole = np.asarray(result[sources].all(1))
        free = total[targets] == 0
        result[targets[free]] |= whole[free]
        wrong = ~free & (whole != result[targets])  # a sum over parts goes exactly when all its parts go
        unlike[targets[wrong]] = True
        unlike[sources[wrong].reshape(-1)] = True
    frozen = atoms.frozen()[roots] > 0
    torn = gone & ((lost < total)[roots] | frozen | unlike[roots])
    result.setflags(write=False)
    conflicts = [(weights[torn & ~frozen], "")] if (torn & ~frozen).any() else []
    for root in np.unique(roots[torn & frozen]):
        conflicts.append((weights[torn & frozen & (roots == root)], atoms.why(np.array([root]))))
    return there, result, conflicts
