"""Families of joint layers, for which one choice is made, and the outer axis of each of their layers.

In attention, queries, keys and values are joint layers of heads by dimensions, coupled by the products between them:
one family. Heads are the outer axis, as they come first in the shape, and the dimensions of a head are the inner one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from torchslim.prune.dependency.constraints import Derived, Joint
from torchslim.prune.dependency.layers import JointKey
from torchslim.prune.dependency.union_find import Atoms, Ids

Derivations = Mapping[JointKey, Sequence[Derived]]
"""Joint layer -> the atoms that are derived from it."""


@dataclass(frozen=True)
class OuterAxes:
    """Outer axes of the joint layers of a family; a layer may have none."""

    axes: dict[JointKey, int]
    counts: dict[JointKey, int]  # how many distinct slices a layer has along its outer axis
    inner_is_fixed: bool  # whether nothing can go along another axis of one of these layers

    def sizes(self) -> tuple[int, int]:
        """Of the first layer, the number of outer slices and the extent of its longest inner axis."""
        key, outer = next(iter(self.axes.items()))
        shape, _ = key
        return self.counts[key], max(size for axis, size in enumerate(shape) if axis != outer)


@dataclass(frozen=True)
class _SliceAxis:
    """An axis of a joint layer with an atom for each of its slices."""

    key: JointKey
    axis: int
    count: int  # number of distinct slices
    classes: Ids  # the slices' classes that can be removed


def find_families(joints: Mapping[JointKey, Joint], derivations: Derivations, atoms: Atoms) -> list[list[JointKey]]:
    """The joint layers from which atoms are derived; those that share removable classes are of one family."""
    frozen = atoms.frozen()
    free_classes = []
    for key, derivation in derivations.items():
        reached = [joints[key].atoms.reshape(-1)] if key in joints else []
        reached += [derived.targets for derived in derivation]
        classes = np.unique(atoms.find(np.concatenate(reached)))
        free_classes.append(classes[frozen[classes] == 0])
    families: dict[int, list[JointKey]] = {}
    for key, number in zip(derivations, _linked(free_classes), strict=True):
        if key in joints:
            families.setdefault(number, []).append(key)
    return list(families.values())


def find_outer_axes(family: Sequence[JointKey], derivations: Derivations, atoms: Atoms) -> OuterAxes:
    """The outer axis of each layer of a family.

    Axes whose slices share classes mean the same thing in all layers, such as heads: they are of one kind. Where a
    layer has axes of two kinds, the kind that stands further to the front is the outer one.
    """
    slice_axes, fixed_axes = _slice_axes(family, derivations, atoms)
    kinds = _linked([slice_axis.classes for slice_axis in slice_axes])
    inner_kinds = _inner_kinds(slice_axes, kinds)
    axes: dict[JointKey, int] = {}
    counts: dict[JointKey, int] = {}
    for slice_axis, kind in zip(slice_axes, kinds, strict=True):
        key = slice_axis.key
        shape, _ = key
        if kind not in inner_kinds:
            axes[key], counts[key] = slice_axis.axis, slice_axis.count
        elif len(shape) == 2 and key not in axes:  # only the inner axis has atoms: the outer one is the other
            axes[key] = 1 - slice_axis.axis
            counts[key] = shape[axes[key]]
    inner_is_fixed = any(key in axes and axis != axes[key] for key, axis in fixed_axes)
    return OuterAxes(axes, counts, inner_is_fixed)


def _slice_axes(
    family: Sequence[JointKey], derivations: Derivations, atoms: Atoms
) -> tuple[list[_SliceAxis], list[tuple[JointKey, int]]]:
    """The axes with an atom for each slice: first those with atoms that can go, then those whose atoms all stay."""
    frozen = atoms.frozen()
    slice_axes: list[_SliceAxis] = []
    fixed_axes: list[tuple[JointKey, int]] = []
    for key in family:
        for derived in derivations[key]:
            if len(derived.axes) > 1:  # these atoms stand for slices of a plane, not of one axis
                continue
            (axis,) = derived.axes
            classes = np.unique(atoms.find(derived.targets))
            free = classes[frozen[classes] == 0]
            if free.size:
                slice_axes.append(_SliceAxis(key, axis, len(derived.targets), free))
            else:
                fixed_axes.append((key, axis))
    return slice_axes, fixed_axes


def _inner_kinds(slice_axes: Sequence[_SliceAxis], kinds: Sequence[int]) -> set[int]:
    """The kinds that stand behind another kind in some layer; positions are means over all layers of the family."""
    positions: dict[int, list[int]] = {}
    kinds_of_layer: dict[JointKey, set[int]] = {}
    for slice_axis, kind in zip(slice_axes, kinds, strict=True):
        positions.setdefault(kind, []).append(slice_axis.axis)
        kinds_of_layer.setdefault(slice_axis.key, set()).add(kind)
    depth = {kind: (np.mean(axes), kind) for kind, axes in positions.items()}  # the kind itself decides ties
    return {
        kind
        for layer_kinds in kinds_of_layer.values()
        for kind in layer_kinds - {min(layer_kinds, key=lambda kind: depth[kind])}
    }


def _linked(class_sets: Sequence[Ids]) -> list[int]:
    """A number for each set of classes: the same for sets that share a class, also through other sets."""
    links = Atoms()
    places = links.fresh(len(class_sets))
    classes = np.concatenate([np.zeros(0, dtype=np.int64), *class_sets])
    owners = np.repeat(places, np.array([len(class_set) for class_set in class_sets], dtype=np.int64))
    _, first, number = np.unique(classes, return_index=True, return_inverse=True)
    # all at once: vision transformers have tens of thousands of classes
    links.union(owners[first][number.reshape(-1)], owners)
    numbers: list[int] = links.find(places).tolist()
    return numbers
