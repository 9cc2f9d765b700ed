"""The atoms of one model and the constraints between them, as a run of the model finds them.

Four kinds of constraints: atoms that are removed together (`Atoms.union`), atoms that must stay (`Atoms.freeze`), joint
layers that must stay rectangular with the atoms derived from them, and parts that must stay equally long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torchslim.core.reason import Reason
from torchslim.prune.dependency.layers import JointKey, Layers, Shape, flat, joint_key, varying
from torchslim.prune.dependency.union_find import Atoms, Ids


@dataclass(frozen=True)
class Joint:
    """A layer that varies along several dimensions: whole slices of it must go, so that it stays rectangular."""

    atoms: Ids
    where: str  # path of the module


@dataclass(frozen=True)
class Derived:
    """Atoms for slices of a joint layer: `targets[i]` is removed exactly when all of `sources[i]` are."""

    targets: Ids
    sources: Ids
    joint: JointKey
    axes: tuple[int, ...]  # the joint layer's axes that the targets vary along; the slices span the others


@dataclass(frozen=True)
class Balance:
    """Parts of a dimension that must stay equally long."""

    parts: tuple[Ids, ...]
    where: str
    fixed: Ids  # atoms that stay if the code cuts the parts at given positions, not in equal shares; may be empty


@dataclass
class Constraints:
    """Atoms, and the constraints between them, each recorded once."""

    atoms: Atoms = field(default_factory=Atoms)
    derived: list[Derived] = field(default_factory=list)
    joints: dict[JointKey, Joint] = field(default_factory=dict)
    balances: dict[bytes, Balance] = field(default_factory=dict)
    where: str = ""  # the running module and operation, for the reasons
    cause: str = ""  # why the operation's inputs are of a fixed size, where an earlier operation made them so
    path: str = ""  # the running module alone; empty for the model itself
    _projections: dict[tuple[JointKey, tuple[int, ...]], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # (joint layer, its kept axes) -> result of `onto`, so that equal slices always have the same derived atom

    def own(self, shape: Shape, *, elastic: bool = False) -> Layers:
        """One layer of new atoms for every dimension of more than one element."""
        layers = []
        for dim, size in enumerate(shape):
            if size > 1:
                view = [1] * len(shape)
                view[dim] = size
                layers.append(torch.from_numpy(self.atoms.fresh(size, elastic=elastic)).view(view))
        return tuple(layers)

    def freeze(self, layers: Iterable[Tensor], why: str) -> None:
        """Make all atoms of these layers stay; the reason names the running operation."""
        reason = f"{why} ({self.where})" if self.where else why
        for layer in layers:
            self.atoms.freeze(layer.numpy(), reason)

    def freeze_at_fixed_size(self, layer: Tensor) -> None:
        """Make a layer stay that meets a value of a fixed size."""
        if self.cause:  # the reader needs the first cause, not the many operations that it reaches
            self.atoms.freeze(layer.numpy(), self.cause)
        else:
            self.freeze([layer], Reason.FIXED_SIZE)

    def note(self, layers: Layers) -> Layers:
        """Record the joint layers among `layers`, and return all of them."""
        for layer in layers:
            if len(varying(layer)) > 1:
                array, key = joint_key(layer)
                if key not in self.joints:
                    self.joints[key] = Joint(array, self.path)
        return layers

    def balance(self, parts: Sequence[Tensor], fixed: Tensor | None = None) -> None:
        """Record that these parts must stay equally long.

        `fixed` holds the atoms that must stay instead if the code cuts the parts off at given positions.
        """
        arrays = tuple(map(flat, parts))
        key = b"|".join(array.tobytes() for array in arrays)
        fixed_ids = np.zeros(0, dtype=np.int64) if fixed is None else flat(fixed)
        if key in self.balances:
            fixed_ids = np.union1d(self.balances[key].fixed, fixed_ids)
        self.balances[key] = Balance(arrays, self.where, fixed_ids)

    def onto(self, layer: Tensor, dims: frozenset[int]) -> Tensor:
        """Project a layer onto `dims`: an atom of the result is removed when all atoms of its slice are."""
        if varying(layer) <= dims:
            return layer
        order = sorted(varying(layer))
        kept = sorted(dims & varying(layer))
        axes = tuple(order.index(dim) for dim in kept)
        _, joint = joint_key(layer)
        if (joint, axes) not in self._projections:
            others = [dim for dim in range(layer.dim()) if dim not in kept]
            count = int(np.prod([layer.shape[dim] for dim in kept]))
            slices = layer.permute(*kept, *others).reshape(count, -1).numpy()
            self._projections[joint, axes] = torch.from_numpy(self._atom_per_slice(slices, joint, axes))
        return self._projections[joint, axes].reshape(
            [size if dim in kept else 1 for dim, size in enumerate(layer.shape)]
        )

    def _atom_per_slice(self, slices: Ids, joint: JointKey, axes: tuple[int, ...]) -> Ids:
        """The first atom of every slice that is one class, and a derived atom for every other slice."""
        roots = self.atoms.find(slices)
        is_one_class = (roots == roots[:, :1]).all(1)
        targets = slices[:, 0].copy()
        if not is_one_class.all():
            # equal slices share one derived atom: a batch that is folded into the heads repeats them
            mixed, first, number = np.unique(slices[~is_one_class], axis=0, return_index=True, return_inverse=True)
            fresh = self.atoms.fresh(len(mixed))
            targets[~is_one_class] = fresh[number.reshape(-1)]
            self.derived.append(Derived(fresh, slices[~is_one_class][first], joint, axes))
        return targets

    def implies(self, other: Tensor, layer: Tensor) -> bool:
        """Do the atoms of `layer` go exactly with whole slices of `other`, so that it adds no constraint?"""
        dims = varying(layer)
        if not dims < varying(other):
            return False
        slices = self.onto(other, dims)
        return np.array_equal(self.atoms.find(slices.numpy()), self.atoms.find(layer.numpy()))
