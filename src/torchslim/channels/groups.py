"""From tags to decisions: which classes of atoms may go, which are alike, and which must go in step.

A *group* holds classes that touch the same dimensions of the same weights: channels of one layer and all that is
coupled to it. A *unit* holds cells of classes that lose equally many each: most often one group, but the two halves
of a split, the groups of a group norm, or a residual stream and the heads whose size is computed from its width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from torchslim.channels.atoms import Atoms, Ids
from torchslim.channels.tags import Derived, Joint, JointKey, Layers
from torchslim.channels.trace import Shape, Trace, Value

Heads = Literal["auto", "whole", "dim"]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Member:
    """One dimension of one weight in a group: which indices belong to which of its classes."""

    weight: str
    dim: int
    indices: Ids  # positions along the dimension
    classes: Ids  # the class of each, as its place in `Group.classes`


@dataclass(frozen=True)
class Group:
    """Channels that are alike: every class takes one slice, or several, of each member."""

    classes: Ids
    members: tuple[Member, ...]
    reason: str  # why it must stay; empty when it may go

    @property
    def name(self) -> str:
        """The first member."""
        return f"{self.members[0].weight}[{self.members[0].dim}]"


@dataclass(frozen=True)
class Cell:
    """Classes that lose `stride` at each step of their unit."""

    classes: Ids
    stride: int = 1


@dataclass(frozen=True)
class Unit:
    """Cells that shrink in step."""

    cells: tuple[Cell, ...]
    groups: tuple[int, ...]  # indices into `Coupling.groups`

    @property
    def width(self) -> int:
        """How many steps there are; one must stay."""
        return min(len(cell.classes) // cell.stride for cell in self.cells)


@dataclass(frozen=True)
class Tie:
    """Two sets of classes of which the first loses `factor` for each that the second loses.

    Where the second stays, the first may go by itself, unless they are of `one` size.
    """

    wide: Ids
    narrow: Ids
    factor: int
    one: bool = False


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

    @cached_property
    def roots(self) -> Ids:
        """The class of every atom."""
        return self.atoms.find(np.arange(self.atoms.count))

    def classes(self, layers: Layers) -> list[Ids]:
        """Each layer with classes in place of atoms."""
        for core in layers:
            if id(core) not in self._roots:  # the trace keeps its layers alive
                self._roots[id(core)] = self.roots[core.numpy()]
        return [self._roots[id(core)] for core in layers]

    def kept(self, layers: Layers, shape: Shape, removed: Mask) -> list[Mask | None]:
        """Per dimension which indices stay; None where all do."""
        keep: list[Mask | None] = [None] * len(shape)
        for classes in self.classes(layers):
            gone = removed[classes]
            if not gone.any():
                continue
            dims = [dim for dim, size in enumerate(classes.shape) if size > 1]
            left = ~gone
            for dim in dims:
                others = tuple(each for each in range(gone.ndim) if each != dim)
                along = left.any(others) if others else left
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
                            others = tuple(each for each in range(classes.ndim) if each != dim)
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
) -> Coupling:
    """Decide what a trace leaves open, and collect the groups.

    Args:
        trace: left as it is.
        heads: what attention loses: whole heads, dimensions of every head, or what the model allows ("auto").
        frozen: weights that must stay as they are.
        modes: by module path, what its joint layers lose: "inner", "even", "tied", "outer" or "none".
        stays: further atoms that must stay, and why.
        shut: by joint layer, the axes along which it cannot lose slices.
    """
    atoms = copy.deepcopy(trace.tagger.atoms)
    for name in frozen:
        for core in trace.weights[name].layers:
            atoms.freeze(core.numpy(), "excluded")
    for ids, why in stays:
        atoms.freeze(ids, why)
    resolver = _Resolver(trace, atoms, heads, modes or {}, shut or {})
    resolver.run()
    groups = [_made_by_weights(group, trace) for group in _groups(trace, atoms)]
    units = _units(trace, atoms, groups, resolver.ties)
    return Coupling(trace, atoms, groups, units, resolver.chosen, resolver.axes)


def _made_by_weights(group: Group, trace: Trace) -> Group:
    """A group that only takes in what a constant table gives stays: nothing that was learnt makes its channels."""
    if group.reason or any(member.weight in trace.parameters for member in group.members if not _takes(member, trace)):
        return group
    return Group(group.classes, group.members, "channels of a constant")


def _takes(member: Member, trace: Trace) -> bool:
    return trace.roles.get((member.weight, member.dim)) == "in"


class _Resolver:
    """Makes every joint layer rectangular: for each decides the axis along which it loses whole slices."""

    def __init__(
        self, trace: Trace, atoms: Atoms, heads: Heads, modes: Mapping[str, str], shut: Mapping[JointKey, set[int]]
    ) -> None:
        self.trace, self.atoms, self.heads, self.modes, self.shut = trace, atoms, heads, modes, shut
        self.joints = trace.tagger.joints
        self.derived: dict[JointKey, list[Derived]] = {}
        for each in trace.tagger.derived:
            self.derived.setdefault(each.joint, []).append(each)
        self.ties: list[Tie] = []
        self.chosen: dict[str, str] = {}
        self.axes: dict[JointKey, int] = {}

    def run(self) -> None:
        for keys in self._families():
            self._decide(keys)
        self._settle_derived()
        for _ in range(len(self.joints) + 1):
            open_ = [key for key, joint in self.joints.items() if not self._rectangular(joint.atoms)]
            if not open_:
                break
            for key in open_:
                atoms, shut = self.joints[key].atoms, self.shut.get(key, set())
                if len(shut) == atoms.ndim:
                    self._freeze(atoms)
                    continue
                self.axes[key] = self._best_axis(atoms, shut)
                self._enforce(atoms, self.axes[key])
            self._settle_derived()

    def _families(self) -> list[list[JointKey]]:
        """Joint layers with something derived, together with those that share classes with them."""
        keys = list(self.derived)
        links = Atoms()
        places = links.fresh(len(keys))
        frozen = self.atoms.frozen()
        owner: dict[int, int] = {}
        for place, key in zip(places, keys, strict=True):
            reach = [self.joints[key].atoms.reshape(-1)] if key in self.joints else []
            reach += [each.targets for each in self.derived[key]]
            for root in np.unique(self.atoms.find(np.concatenate(reach))):
                if not frozen[root]:
                    links.union(np.array([owner.setdefault(int(root), int(place))]), np.array([place]))
        families: dict[int, list[JointKey]] = {}
        for place, key in zip(places, keys, strict=True):
            if key in self.joints:
                families.setdefault(int(links.find(np.array([place]))[0]), []).append(key)
        return list(families.values())

    def _decide(self, keys: list[JointKey]) -> None:
        """One choice for a family: whole slices along the outer axis (heads, groups) or along the inner one."""
        outer_axes, inner_shut, counts = self._outer_axes(keys)
        if not outer_axes:
            return
        sides = [
            (counts[key], max(size for other, size in enumerate(key[0]) if other != axis))
            for key, axis in outer_axes.items()
        ]
        mode = self._mode(keys, sides, inner_shut)
        self.chosen |= {self.joints[key].where: mode for key in keys}
        levels: dict[tuple[str, int], Ids] = {}
        for key in keys:
            atoms = self.joints[key].atoms
            if mode == "none":
                self._freeze(atoms)
            elif key not in outer_axes:
                continue  # nothing is asked of it by itself: it follows the others
            elif mode == "outer":
                self._enforce(atoms, outer_axes[key])
            else:
                inner = [axis for axis in range(len(key[0])) if axis != outer_axes[key]]
                self._enforce(atoms, inner[-1])
                if mode == "tied":
                    self._tie(key, inner[-1], counts[key])
                elif mode == "even":
                    self._level(key, inner[-1], levels)
        self._settle_derived(keys)

    def _outer_axes(self, keys: list[JointKey]) -> tuple[dict[JointKey, int], bool, dict[JointKey, int]]:
        """Per joint layer its outer axis, whether an inner one is of a fixed size, and how many outer slices differ.

        Axes whose derived atoms are coupled mean the same thing; where a layer has two, the later one is the inner.
        """
        frozen = self.atoms.frozen()
        shut: list[tuple[JointKey, int]] = []
        nodes: list[tuple[JointKey, int]] = []
        counts: list[int] = []
        links, owner = Atoms(), dict[int, int]()
        for key in keys:
            for each in self.derived[key]:
                roots = np.unique(self.atoms.find(each.targets))
                alive = roots[frozen[roots] == 0]
                if len(each.axes) > 1:
                    continue
                if not alive.size:
                    shut.append((key, each.axes[0]))
                    continue
                place = int(links.fresh(1)[0])
                nodes.append((key, each.axes[0]))
                counts.append(len(each.targets))
                for root in alive.tolist():
                    links.union(np.array([owner.setdefault(root, place)]), np.array([place]))
        kinds = links.find(np.arange(1, len(nodes) + 1)).tolist()
        depth = {kind: np.mean([axis for (_, axis), own in zip(nodes, kinds, strict=True) if own == kind]) for kind in kinds}
        inner_kinds = {
            max(one, two, key=lambda kind: (depth[kind], kind))
            for (key, _), one in zip(nodes, kinds, strict=True)
            for (other, _), two in zip(nodes, kinds, strict=True)
            if key == other and one != two
        }
        outer: dict[JointKey, int] = {}
        sizes: dict[JointKey, int] = {}
        for (key, axis), kind, count in zip(nodes, kinds, counts, strict=True):
            if kind not in inner_kinds:
                outer[key], sizes[key] = axis, count
            elif len(key[0]) == 2 and key not in outer:
                outer[key], sizes[key] = 1 - axis, key[0][1 - axis]
        return outer, any(key in outer and axis != outer[key] for key, axis in shut), sizes

    def _mode(self, keys: list[JointKey], sides: Sequence[tuple[int, int]], inner_shut: bool) -> str:
        for key in keys:
            if self.joints[key].where in self.modes:
                return self.modes[self.joints[key].where]
        if inner_shut:
            return "outer"
        if any(len({each.axes for each in self.derived[key]}) == 1 for key in keys):  # attention: heads by dimensions
            return "outer" if self.heads == "whole" else "inner"
        outer, inner = sides[0]
        return "outer" if outer > inner else "inner"

    def _freeze(self, atoms: Ids) -> None:
        self.atoms.freeze(atoms, "neither whole heads nor parts of each can go")

    def _level(self, key: JointKey, axis: int, levels: dict[tuple[str, int], Ids]) -> None:
        """One number in the module sizes what queries, keys and values have in a head: they shrink in step."""
        joint = self.joints[key]
        mine = np.moveaxis(joint.atoms, axis, 0).reshape(joint.atoms.shape[axis], -1)[:, 0]
        first = levels.setdefault((joint.where, len(mine)), mine)
        if not np.array_equal(self.atoms.find(first), self.atoms.find(mine)):
            self.ties.append(Tie(mine, first, 1, one=True))

    def _tie(self, key: JointKey, axis: int, heads: int) -> None:
        """The size of a head is computed from the width of what comes in: both shrink in step."""
        joint = self.joints[key]
        narrow = self.atoms.find(np.moveaxis(joint.atoms, axis, 0).reshape(joint.atoms.shape[axis], -1)[:, 0])
        mine = set(np.unique(self.atoms.find(joint.atoms)).tolist())
        for operation in self.trace.operations:
            if not f"{operation.path}.".startswith(f"{joint.where}."):
                continue
            for value in operation.inputs:
                for core in value.layers:
                    if core.numel() == heads * len(narrow) and max(core.shape) == core.numel():
                        wide = np.unique(self.atoms.find(core.numpy().reshape(-1)))
                        if len(wide) == core.numel() and not mine & set(wide.tolist()):
                            self.ties.append(Tie(wide, narrow, heads))
                            return
        self._freeze(joint.atoms)

    def _enforce(self, atoms: Ids, axis: int) -> None:
        moved = np.moveaxis(atoms, axis, 0).reshape(atoms.shape[axis], -1)
        self.atoms.union(moved, moved[:, :1])

    def _settle_derived(self, keys: Iterable[JointKey] | None = None) -> None:
        """A derived atom is its sources' class where they are one, and stays where they are several."""
        chosen = self.trace.tagger.derived if keys is None else [each for key in keys for each in self.derived[key]]
        for each in chosen:
            roots = self.atoms.find(each.sources)
            single = (roots == roots[:, :1]).all(1)
            self.atoms.union(each.targets[single], each.sources[single, 0])
            self.atoms.freeze(each.targets[~single], "parts of it stay")

    def _rectangular(self, atoms: Ids) -> bool:
        roots = self.atoms.find(atoms)
        frozen = self.atoms.frozen()[roots] > 0
        if frozen.all():
            return True
        for axis in range(atoms.ndim):
            moved = np.moveaxis(roots, axis, 0).reshape(atoms.shape[axis], -1)
            stays = np.moveaxis(frozen, axis, 0).reshape(atoms.shape[axis], -1).all(1)
            if ((moved == moved[:, :1]).all(1) | stays).all():
                return True
        return False

    def _best_axis(self, atoms: Ids, shut: set[int]) -> int:
        """The axis that leaves the most classes free."""
        roots = self.atoms.find(atoms)
        frozen = self.atoms.frozen()
        labels, inverse = np.unique(roots, return_inverse=True)
        inverse = inverse.reshape(roots.shape)
        scores = []
        for axis in range(atoms.ndim):
            trial = Atoms()
            ids = trial.fresh(len(labels))
            trial.freeze(ids[frozen[labels] > 0], "stays")
            moved = ids[np.moveaxis(inverse, axis, 0).reshape(atoms.shape[axis], -1)]
            trial.union(moved, moved[:, :1])
            classes = np.unique(trial.find(ids))
            scores.append((int((trial.frozen()[classes] == 0).sum()), atoms.shape[axis]))
        return max((axis for axis in range(atoms.ndim) if axis not in shut), key=scores.__getitem__)


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
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
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


def _counted(roots: Ids) -> dict[int, int]:
    values, counts = np.unique(roots, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _units(trace: Trace, atoms: Atoms, groups: list[Group], ties: Sequence[Tie]) -> list[Unit]:
    """Free groups, split into cells by what must stay in balance, and tied where they must shrink in step."""
    frozen = atoms.frozen()
    group_of = {
        int(root): number for number, group in enumerate(groups) if not group.reason for root in group.classes
    }
    labels: dict[int, list[tuple[int, ...]]] = {}
    bound: list[list[dict[int, int]]] = []
    for number, balance in enumerate(trace.tagger.balances.values()):
        parts = [_counted(atoms.find(part)) for part in balance.parts]
        inside: dict[int, list[int]] = {}
        for index, part in enumerate(parts):
            for root in part:
                inside.setdefault(root, []).append(index)
        shared = {
            root
            for root, places in inside.items()
            if frozen[root] or (len(places) == len(parts) and len({part[root] for part in parts}) == 1)
        }
        own = [{root: count for root, count in part.items() if root not in shared} for part in parts]
        if any(own):
            bound.append(own)
            for root, places in inside.items():
                if root not in shared:
                    labels.setdefault(root, []).append((number, *places))
    cells: dict[tuple[int, tuple[tuple[int, ...], ...]], list[int]] = {}
    for root, number in group_of.items():
        if not frozen[root]:
            cells.setdefault((number, tuple(labels.get(root, ()))), []).append(root)
    keys = list(cells)
    links = Atoms()
    places = links.fresh(len(keys))
    cell_of = {root: place for place, key in enumerate(keys) for root in cells[key]}
    stride = [1] * len(keys)
    stuck: set[int] = set()
    for own in bound:
        # one class from each cell: every part must lose equally many of its elements
        losses = [{(cell_of.get(root, -1), count) for root, count in part.items()} for part in own]
        mine = sorted({place for each in losses for place, _ in each})
        if mine[:1] == [-1] or len({sum(count for _, count in each) for each in losses}) > 1:
            stuck |= {root for part in own for root in part}
        else:
            links.union(places[np.array(mine)], places[np.array(mine[:1])])
    for tie in ties:
        ends = [atoms.find(each).tolist() for each in (tie.wide, tie.narrow)]
        wide, narrow = (sorted({cell_of[root] for root in each if root in cell_of}) for each in ends)
        if len(wide) != 1 or len(narrow) != 1:
            stuck |= {*ends[1], *(ends[0] if narrow or tie.one else ())}
            continue
        stride[wide[0]] = max(stride[wide[0]], tie.factor)
        links.union(places[[wide[0]]], places[[narrow[0]]])
    units: dict[int, list[int]] = {}
    for place in range(len(keys)):
        units.setdefault(int(links.find(places[[place]])[0]), []).append(place)
    result = []
    for inside in units.values():
        if any(root in stuck for place in inside for root in cells[keys[place]]):
            continue
        parts_ = tuple(Cell(np.array(cells[keys[place]]), stride[place]) for place in inside)
        unit = Unit(parts_, tuple(sorted({keys[place][0] for place in inside})))
        if unit.width > 1:
            result.append(unit)
    return result
