"""Resolves joint layers: decides for each along which axis it loses whole slices.

A trace leaves this open. Say an attention has two heads of three dimensions, and the channels of its values are the
joint layer [[1, 2, 3], [4, 5, 6]]. It must stay rectangular, so there are two ways:

    "outer"     couples 1-2-3 and 4-5-6: whole heads go
    "inner"     couples 1-4, 2-5 and 3-6: every head loses the same dimensions

A sum over the dimensions has derived atoms 7 and 8, one for each head: 7 goes when 1, 2 and 3 all go. With "outer",
7 is coupled with 1-2-3; with "inner", 7 must stay, as a part of the head stays. `Resolver.run` has three stages:

1. Decide for each family of joint layers that atoms are derived from: one choice for queries, keys and values.
2. Settle the derived atoms: couple them with their sources, or make them stay.
3. Couple the slices of every other joint layer along the axis that leaves the most classes free.

Further modes: "even" and "tied" are "inner", and "outer tied" is "outer", with ties to sizes that shrink in step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchslim.prune.dependency.constraints import Derived, Joint
from torchslim.prune.dependency.families import OuterAxes, find_families, find_outer_axes
from torchslim.prune.dependency.layers import JointKey
from torchslim.prune.dependency.rectangles import best_axis, couple_slices, is_rectangular, slices
from torchslim.prune.dependency.trace import Trace
from torchslim.prune.dependency.union_find import Atoms, Ids

Heads = Literal["auto", "whole", "dim"]


@dataclass(frozen=True)
class Tie:
    """Two sets of classes: `wide` loses `factor` classes for each that `narrow` loses.

    Where `narrow` must stay, `wide` may go by itself, unless `one` is set.
    """

    wide: Ids
    narrow: Ids
    factor: int
    one: bool = False  # both are sized by one number in the code


class Resolver:
    """Couples and freezes atoms until every joint layer is rectangular.

    After `run`, `chosen` has the mode of every module with a family, `axes` the axis of every joint layer that stage 3
    coupled, and `ties` the classes that must shrink in step.
    """

    def __init__(
        self, trace: Trace, atoms: Atoms, heads: Heads, modes: Mapping[str, str], shut: Mapping[JointKey, set[int]]
    ) -> None:
        self.trace, self.atoms, self.heads, self.modes, self.shut = trace, atoms, heads, modes, shut
        self.joints = trace.tagger.joints
        self.derivations: dict[JointKey, list[Derived]] = {}
        for derived in trace.tagger.derived:
            self.derivations.setdefault(derived.joint, []).append(derived)
        self.ties: list[Tie] = []
        self.chosen: dict[str, str] = {}
        self.axes: dict[JointKey, int] = {}

    def run(self) -> None:
        """Run the three stages."""
        for family in find_families(self.joints, self.derivations, self.atoms):
            self._decide(family)
        self._settle(self.trace.tagger.derived)
        self._couple_remaining()

    # -- stage 1: families ------------------------------------------------------------------------------------------

    def _decide(self, family: Sequence[JointKey]) -> None:
        """Choose a mode for a family, and couple or freeze its layers."""
        outer = find_outer_axes(family, self.derivations, self.atoms)
        if not outer.axes:
            return
        mode = self._mode(family, outer)
        self.chosen |= {self.joints[key].where: mode for key in family}
        first_of_length: dict[tuple[str, int], Ids] = {}
        for key in family:
            if mode == "none":
                self._freeze(self.joints[key])
            elif key in outer.axes:  # a layer without an outer axis follows the others
                self._couple(key, mode, outer, first_of_length)
        self._settle([derived for key in family for derived in self.derivations[key]])

    def _mode(self, family: Sequence[JointKey], outer: OuterAxes) -> str:
        """The mode that is given for a module of the family, or else "outer" or "inner"."""
        for key in family:
            if self.joints[key].where in self.modes:
                return self.modes[self.joints[key].where]
        if outer.inner_is_fixed:
            return "outer"
        count, inner_size = outer.sizes()
        is_outer = count > inner_size
        # attention: its products sum over the dimensions of heads, so atoms are derived along one axis alone
        if any(len({derived.axes for derived in self.derivations[key]}) == 1 for key in family):
            is_outer = self.heads == "whole" or (is_outer and self.heads != "dim" and self._has_weight_channels(outer))
        return "outer" if is_outer else "inner"

    def _has_weight_channels(self, outer: OuterAxes) -> bool:
        """Are the outer slices of some layer the channels of a weight, one to one?

        A maximum over pieces (maxout) leaves one value per outer slice: a channel of the next layer. Attention leaves
        scores for each head, which belong to no weight.
        """
        return any(
            derived.axes == (axis,) and self._is_weight_layer(derived.targets)
            for key, axis in outer.axes.items()
            for derived in self.derivations[key]
        )

    def _is_weight_layer(self, ids: Ids) -> bool:
        """Does a layer of some weight have the classes of these atoms, which must all differ?"""
        classes = np.unique(self.atoms.find(ids))
        if len(classes) != len(ids):
            return False
        return any(
            layer.numel() == len(classes) and np.array_equal(self._classes(layer.numpy()), classes)
            for value in self.trace.weights.values()
            for layer in value.layers
        )

    def _couple(self, key: JointKey, mode: str, outer: OuterAxes, first_of_length: dict[tuple[str, int], Ids]) -> None:
        """Couple the slices of a joint layer along the axis of its mode, and tie them where the mode demands it."""
        joint, outer_axis = self.joints[key], outer.axes[key]
        if mode in ("outer", "outer tied"):
            couple_slices(self.atoms, joint.atoms, outer_axis)
            if mode == "outer tied":
                self._tie(joint, outer_axis, joint.atoms.size // joint.atoms.shape[outer_axis])
            return
        *_, inner_axis = (axis for axis in range(joint.atoms.ndim) if axis != outer_axis)
        couple_slices(self.atoms, joint.atoms, inner_axis)
        if mode == "tied":
            self._tie(joint, inner_axis, outer.counts[key])
        elif mode == "even":
            self._even(joint, inner_axis, first_of_length)

    def _even(self, joint: Joint, axis: int, first_of_length: dict[tuple[str, int], Ids]) -> None:
        """Tie the layer to the module's first one of the same length along `axis`.

        One number in the module sizes queries, keys and values of a head, so they must shrink in step.
        """
        ids = slices(joint.atoms, axis)[:, 0]
        first = first_of_length.setdefault((joint.where, len(ids)), ids)
        if not np.array_equal(self.atoms.find(first), self.atoms.find(ids)):
            self.ties.append(Tie(ids, first, 1, one=True))

    def _tie(self, joint: Joint, axis: int, factor: int) -> None:
        """Tie the slices along `axis` to the width of the module's input; freeze the layer if there is no such input.

        The module computes the size or the number of its heads from that width, so both must shrink in step.
        """
        narrow = self._classes(slices(joint.atoms, axis)[:, 0])  # distinct: a batch folded into the heads repeats them
        wide = self._input_channels(joint, factor * len(narrow))
        if wide is None:
            self._freeze(joint)
        else:
            self.ties.append(Tie(wide, narrow, factor))

    def _input_channels(self, joint: Joint, count: int) -> Ids | None:
        """Classes of the first `count` different channels that enter an operation of the module, besides its own."""
        own = self._classes(joint.atoms)
        prefix = f"{joint.where}." if joint.where else ""
        for operation in self.trace.operations:
            if not f"{operation.path}.".startswith(prefix):
                continue
            for layer in (layer for value in operation.inputs for layer in value.layers):
                if layer.numel() == count and max(layer.shape) == count:  # it varies along one dimension alone
                    classes = self._classes(layer.numpy())
                    if len(classes) == count and not np.isin(classes, own).any():
                        return classes
        return None

    def _classes(self, ids: Ids) -> Ids:
        """The different classes of some atoms, in order."""
        return np.unique(self.atoms.find(ids))

    def _freeze(self, joint: Joint) -> None:
        self.atoms.freeze(joint.atoms, "neither whole heads nor parts of each can go")

    # -- stage 2: derived atoms -------------------------------------------------------------------------------------

    def _settle(self, derivations: Iterable[Derived]) -> None:
        """Couple each derived atom with its sources where these are one class, and freeze it where they are several."""
        for derived in derivations:
            classes = self.atoms.find(derived.sources)
            is_one_class = (classes == classes[:, :1]).all(1)
            self.atoms.union(derived.targets[is_one_class], derived.sources[is_one_class, 0])
            self.atoms.freeze(derived.targets[~is_one_class], "parts of it stay")

    # -- stage 3: all other joint layers ----------------------------------------------------------------------------

    def _couple_remaining(self) -> None:
        """Couple slices until every joint layer is rectangular: coupling one layer may tear another."""
        for _ in range(len(self.joints) + 1):
            torn = [key for key, joint in self.joints.items() if not is_rectangular(self.atoms, joint.atoms)]
            if not torn:
                break
            for key in torn:
                self._couple_best_axis(key)
            self._settle(self.trace.tagger.derived)

    def _couple_best_axis(self, key: JointKey) -> None:
        """Couple the slices of a joint layer along the best axis that is not shut; freeze it if all are."""
        joint, shut = self.joints[key], self.shut.get(key, set())
        if len(shut) == joint.atoms.ndim:
            self._freeze(joint)
            return
        self.axes[key] = best_axis(self.atoms, joint.atoms, shut)
        couple_slices(self.atoms, joint.atoms, self.axes[key])
