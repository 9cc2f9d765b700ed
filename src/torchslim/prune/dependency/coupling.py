"""From tags to decisions: which classes of atoms may go, which are alike, and which must go in step.

A *group* holds classes that touch the same dimensions of the same weights: channels of one layer and all that is
coupled to it. A *unit* holds cells of classes that lose equally many each: most often one group, but the two halves
of a split, the groups of a group norm, or a residual stream and the heads whose size is computed from its width.
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
    """A trace with every choice made. `removed` is everywhere a boolean per atom, True for what goes."""

    trace: Trace
    atoms: Atoms
    groups: list[Group]
    units: list[Unit]
    modes: dict[str, str] = field(default_factory=dict)  # by module path, what its joint layers lose
    axes: dict[JointKey, int] = field(default_factory=dict)  # of other joint layers: along which they lose slices
    _roots: dict[int, Ids] = field(default_factory=dict)
    _kept: dict[tuple[int, ...], list[Mask | None]] = field(default_factory=dict)  # of `_kept_of`
    _kept_of: Mask | None = None

    @cached_property
    def roots(self) -> Ids:
        """The class of every atom."""
        return self.atoms.find(np.arange(self.atoms.count))

    @cached_property
    def learnt(self) -> Mask:
        """Per atom: is it the class of a weight's slice that may go, and not only of a size that adapts?"""
        found = np.zeros(self.atoms.count, dtype=bool)
        for value in self.trace.weights.values():
            for classes in self.classes(value.layers):
                found[classes] = True
        free: Mask = self.atoms.frozen() == 0
        return np.logical_and(found, free)

    def classes(self, layers: Layers) -> list[Ids]:
        """Each layer with classes in place of atoms."""
        for core in layers:
            if id(core) not in self._roots:  # the trace keeps its layers alive
                self._roots[id(core)] = self.roots[core.numpy()]
        return [self._roots[id(core)] for core in layers]

    def kept(self, layers: Layers, shape: Shape, removed: Mask) -> list[Mask | None]:
        """Per dimension which indices stay; None where all do.

        Many values share their layers, so what is found for a removal that nobody can write to any more is remembered.
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
            left = ~gone
            for dim in dims:
                others = tuple(index for index in range(gone.ndim) if index != dim)
                along: Mask = np.asarray(left.any(axis=others)) if others else left
                if not along.all():
                    before = keep[dim]
                    keep[dim] = along if before is None else before & along
        return keep

    def shape(self, value: Value, removed: Mask) -> Shape:
        """The shape that a value will have."""
        keep = self.kept(value.layers, value.shape, removed)
        return tuple(size if each is None else int(each.sum()) for size, each in zip(value.shape, keep, strict=True))

    def parameters(self, removed: Mask, names: Iterable[str]) -> int:
        """How many numbers these weights will hold."""
        return sum(int(np.prod(self.shape(self.trace.weights[name], removed))) for name in names)

    def macs(self, removed: Mask) -> int:
        """Multiply-accumulates of the traced run, after."""
        counts: dict[int, float] = {}
        total = 0.0
        for operation in self.trace.operations:
            cost = float(operation.macs)
            for layers, dim in operation.factors:
                for core, classes in zip(layers, self.classes(layers), strict=True):
                    if classes.shape[dim] > 1:
                        key = id(core) * 8 + dim
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
    """Decide what a trace leaves open, and collect the groups.

    Args:
        trace: left as it is.
        heads: what attention loses: whole heads, dimensions of every head, or what the model allows ("auto").
        frozen: weights that must stay as they are.
        modes: by module path, what its joint layers lose: "inner", "even", "outer", "tied", "outer tied" or "none".
        stays: further atoms that must stay, and why.
        shut: by joint layer, the axes along which it cannot lose slices.
        placed: the balances whose parts are cut at given positions, not in equal shares.
    """
    atoms = copy.deepcopy(trace.tagger.atoms)
    for name in frozen:
        for core in trace.weights[name].layers:
            atoms.freeze(core.numpy(), Reason.EXCLUDED)
    for ids, why in stays:
        atoms.freeze(ids, why)
    shares = trace.tagger.balances
    # shares of which one cannot lose anything are none
    placed = {*placed, *(key for key, each in shares.items() if len(each.fixed) and any(map(atoms.stuck, each.parts)))}
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
    """A group that only takes in what a constant table gives stays: nothing that was learnt makes its channels."""
    if group.reason or any(member.weight in trace.parameters for member in group.members if not _takes(member, trace)):
        return group
    return Group(group.classes, group.members, "channels of a constant")


def _takes(member: Member, trace: Trace) -> bool:
    return trace.roles.get((member.weight, member.dim)) == "in"


def _groups(trace: Trace, atoms: Atoms) -> list[Group]:
    """Classes by the dimensions of weights that they touch."""
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
    for _, _, roots in touches:  # classes in the order of their first member, which is the order of its channels
        for number in np.unique(group_of[roots]):
            if int(number) not in order:
                mine = roots[group_of[roots] == number]
                order[int(number)] = [mine[np.sort(np.unique(mine, return_index=True)[1])]]
    place = np.zeros(atoms.count, dtype=np.int64)
    for (ids,) in order.values():
        place[ids] = np.arange(len(ids))
    members: dict[int, list[Member]] = {number: [] for number in order}
    for name, dim, roots in touches:
        numbers = group_of[roots]
        for number in np.unique(numbers):
            indices = np.flatnonzero(numbers == number)
            members[int(number)].append(Member(name, dim, indices, place[roots[indices]]))
    return [
        Group(ids, tuple(members[number]), atoms.reasons[frozen[ids[0]] - 1] if frozen[ids[0]] else "")
        for number, (ids,) in order.items()
    ]
