"""Decides which classes of atoms can be removed, which form a group, and which groups must shrink in step.

A *group* holds classes that touch the same dimensions of the same weights: the channels of one layer and everything
coupled to them. A *unit* holds cells of classes that shrink in step. Most units hold one group; others hold the two
halves of a split, the groups of a group norm, or a residual stream and the heads whose size is computed from its width.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from torchslim.core.reason import Reason
from torchslim.prune.dependency.groups import Group, Member, Unit, collect_units
from torchslim.prune.dependency.propagation import JointKey, Layers
from torchslim.prune.dependency.resolve import Heads, Resolver
from torchslim.prune.dependency.trace import Shape, Trace, Value
from torchslim.prune.dependency.union_find import Atoms, Ids

Mask = NDArray[np.bool_]

UNEVEN = "cannot shrink evenly with what must stay in balance with it"


@dataclass
class Coupling:
    """A trace with all choices made. `removed` always has one boolean per atom, True where the atom is removed."""

    trace: Trace
    atoms: Atoms
    groups: list[Group]
    units: list[Unit]
    modes: dict[str, str] = field(default_factory=dict)  # module path -> what its joint layers lose
    axes: dict[JointKey, int] = field(default_factory=dict)  # other joint layer -> axis along which it loses slices
    _roots: dict[int, Ids] = field(default_factory=dict)
    _kept: dict[tuple[int, ...], list[Mask | None]] = field(default_factory=dict)  # cached for `_kept_of`
    _kept_of: Mask | None = None

    @cached_property
    def roots(self) -> Ids:
        """The class of every atom."""
        return self.atoms.find(np.arange(self.atoms.count))

    @cached_property
    def learnt(self) -> Mask:
        """Mask of the classes of removable weight slices; classes of sizes that only adapt are False."""
        touched = np.zeros(self.atoms.count, dtype=bool)
        for value in self.trace.weights.values():
            for classes in self.classes(value.layers):
                touched[classes] = True
        free: Mask = self.atoms.frozen() == 0
        return np.logical_and(touched, free)

    def classes(self, layers: Layers) -> list[Ids]:
        """The layers, with classes in place of atoms."""
        for core in layers:
            if id(core) not in self._roots:  # the trace keeps its layers alive
                self._roots[id(core)] = self.roots[core.numpy()]
        return [self._roots[id(core)] for core in layers]

    def kept(self, layers: Layers, shape: Shape, removed: Mask) -> list[Mask | None]:
        """One mask per dimension, True for the indices that stay; None where all of them stay.

        Many values share their layers, so the masks for a read-only `removed` are cached.
        """
        if removed.flags.writeable:
            return self._keep(layers, shape, removed)
        if self._kept_of is not removed:
            self._kept_of, self._kept = removed, {}
        key = (len(shape), *map(id, layers))  # the trace keeps its layers alive
        if key not in self._kept:
            self._kept[key] = self._keep(layers, shape, removed)
        return self._kept[key]

    def _keep(self, layers: Layers, shape: Shape, removed: Mask) -> list[Mask | None]:
        keep: list[Mask | None] = [None] * len(shape)
        for classes in self.classes(layers):
            gone = removed[classes]
            if not gone.any():
                continue
            dims = [dim for dim, size in enumerate(classes.shape) if size > 1]
            stays = ~gone
            for dim in dims:
                others = tuple(index for index in range(gone.ndim) if index != dim)
                mask: Mask = np.asarray(stays.any(axis=others)) if others else stays
                if not mask.all():
                    previous = keep[dim]
                    keep[dim] = mask if previous is None else previous & mask
        return keep

    def shape(self, value: Value, removed: Mask) -> Shape:
        """Shape of a value after the removal."""
        keep = self.kept(value.layers, value.shape, removed)
        return tuple(size if mask is None else int(mask.sum()) for size, mask in zip(value.shape, keep, strict=True))

    def parameters(self, removed: Mask, names: Iterable[str]) -> int:
        """Number of elements of the weights `names` after the removal."""
        return sum(int(np.prod(self.shape(self.trace.weights[name], removed))) for name in names)

    def macs(self, removed: Mask) -> int:
        """MACs of the traced run after the removal."""
        counts: dict[tuple[int, int], float] = {}
        total = 0.0
        for operation in self.trace.operations:
            cost = float(operation.macs)
            for layers, dim in operation.factors:
                for core, classes in zip(layers, self.classes(layers), strict=True):
                    if classes.shape[dim] > 1:
                        key = id(core), dim
                        if key not in counts:
                            others = tuple(index for index in range(classes.ndim) if index != dim)
                            counts[key] = float((~removed[classes]).any(others).mean())
                        cost *= counts[key]
            total += cost
        return round(total)


def couple(
    trace: Trace,
    *,
    heads: Heads = "auto",
    frozen: Iterable[str] = (),
    modes: Mapping[str, str] | None = None,
    stays: Iterable[tuple[Ids, str]] = (),
    shut: Mapping[JointKey, set[int]] | None = None,
    placed: Collection[bytes] = (),
) -> Coupling:
    """Make the choices that a trace leaves open, and collect the groups and units.

    Args:
        trace: not modified.
        heads: whether attention loses whole heads, dimensions of every head, or what the model allows ("auto").
        frozen: names of the weights that must not change.
        modes: module path -> what its joint layers lose: "inner", "even", "outer", "tied", "outer tied" or "none".
        stays: further atoms that must stay, with the reasons.
        shut: joint layer -> the axes along which it cannot lose slices.
        placed: keys of the balances whose parts are cut at given positions, not in equal shares.
    """
    atoms = copy.deepcopy(trace.tagger.atoms)
    for name in frozen:
        for core in trace.weights[name].layers:
            atoms.freeze(core.numpy(), Reason.EXCLUDED)
    for ids, why in stays:
        atoms.freeze(ids, why)
    balances = trace.tagger.balances
    # parts are not equal shares if one of them cannot lose anything
    placed = {
        *placed,
        *(key for key, balance in balances.items() if len(balance.fixed) and any(map(atoms.stuck, balance.parts))),
    }
    for key in placed:
        atoms.freeze(trace.tagger.balances[key].fixed, "cut at a given position")
    resolver = Resolver(trace, atoms, heads, modes or {}, shut or {})
    resolver.run()
    groups = [_made_by_weights(group, trace) for group in _groups(trace, atoms)]
    units = collect_units(trace, atoms, groups, resolver.ties, placed)
    moving = {number for unit in units for number in unit.groups}
    groups = [
        group if group.reason or number in moving else replace(group, reason=UNEVEN)
        for number, group in enumerate(groups)
    ]
    return Coupling(trace, atoms, groups, units, resolver.chosen, resolver.axes)


def _made_by_weights(group: Group, trace: Trace) -> Group:
    """The group, with a reason to stay if no parameter produces its channels: they come from a constant table."""
    if group.reason or any(member.weight in trace.parameters for member in group.members if not _takes(member, trace)):
        return group
    return Group(group.classes, group.members, "channels of a constant")


def _takes(member: Member, trace: Trace) -> bool:
    return trace.roles.get((member.weight, member.dim)) == "in"


def _groups(trace: Trace, atoms: Atoms) -> list[Group]:
    """Groups of the classes that touch the same dimensions of the same weights."""
    frozen = atoms.frozen()
    signature = np.zeros(atoms.count, dtype=np.uint64)
    touches: list[tuple[str, int, Ids]] = []
    generator = np.random.default_rng(0)
    for name, value in trace.weights.items():
        for core in value.layers:
            dim = next(place for place, size in enumerate(core.shape) if size > 1)
            roots = atoms.find(core.numpy().reshape(-1))
            touches.append((name, dim, roots))
            # a sum of random numbers stands for the multiset of dimensions
            np.add.at(signature, roots, generator.integers(2**63, dtype=np.uint64))
    if not touches:
        return []
    classes = np.unique(np.concatenate([roots for _, _, roots in touches]))
    keys = np.stack([signature[classes], frozen[classes].astype(np.uint64)], 1)
    _, inverse = np.unique(keys, axis=0, return_inverse=True)
    group_of = np.full(atoms.count, -1, dtype=np.int64)
    group_of[classes] = inverse.reshape(-1)
    order: dict[int, list[Ids]] = {}
    for _, _, roots in touches:  # order classes as the group's first member has them: by its channels
        for number in np.unique(group_of[roots]):
            if int(number) not in order:
                classes_inside = roots[group_of[roots] == number]
                order[int(number)] = [classes_inside[np.sort(np.unique(classes_inside, return_index=True)[1])]]
    position = np.zeros(atoms.count, dtype=np.int64)
    for (ids,) in order.values():
        position[ids] = np.arange(len(ids))
    members: dict[int, list[Member]] = {number: [] for number in order}
    for name, dim, roots in touches:
        numbers = group_of[roots]
        for number in np.unique(numbers):
            indices = np.flatnonzero(numbers == number)
            members[int(number)].append(Member(name, dim, indices, position[roots[indices]]))
    return [
        Group(ids, tuple(members[number]), atoms.reasons[frozen[ids[0]] - 1] if frozen[ids[0]] else "")
        for number, (ids,) in order.items()
    ]
