"""What a trace leaves open: along which axis a layer of several dimensions loses whole slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchslim.prune.dependency.propagation import Derived, JointKey
from torchslim.prune.dependency.trace import Trace
from torchslim.prune.dependency.union_find import Atoms, Ids

Heads = Literal["auto", "whole", "dim"]


@dataclass(frozen=True)
class Tie:
    """Two sets of classes of which the first loses `factor` for each that the second loses.

    Where the second stays, the first may go by itself, unless they are of `one` size.
    """

    wide: Ids
    narrow: Ids
    factor: int
    one: bool = False


class Resolver:
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
        roots, owners = [np.zeros(0, dtype=np.int64)], [places[:0]]
        for place, key in zip(places, keys, strict=True):
            reach = [self.joints[key].atoms.reshape(-1)] if key in self.joints else []
            reach += [each.targets for each in self.derived[key]]
            roots.append(np.unique(self.atoms.find(np.concatenate(reach))))
            owners.append(np.full(len(roots[-1]), place))
        root, owner = np.concatenate(roots), np.concatenate(owners)
        free = self.atoms.frozen()[root] == 0
        root, owner = root[free], owner[free]
        _, first, same = np.unique(root, return_index=True, return_inverse=True)
        links.union(owner[first][same.reshape(-1)], owner)  # all at once: vision transformers have tens of thousands
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
        mode = self._mode(keys, sides, inner_shut, outer_axes)
        self.chosen |= {self.joints[key].where: mode for key in keys}
        levels: dict[tuple[str, int], Ids] = {}
        for key in keys:
            atoms = self.joints[key].atoms
            if mode == "none":
                self._freeze(atoms)
            elif key not in outer_axes:
                continue  # nothing is asked of it by itself: it follows the others
            elif mode in ("outer", "outer tied"):
                self._enforce(atoms, outer_axes[key])
                if mode == "outer tied":
                    self._tie(key, outer_axes[key], atoms.size // atoms.shape[outer_axes[key]])
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
        depth = {
            kind: np.mean([axis for (_, axis), own in zip(nodes, kinds, strict=True) if own == kind]) for kind in kinds
        }
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

    def _mode(
        self,
        keys: list[JointKey],
        sides: Sequence[tuple[int, int]],
        inner_shut: bool,
        outer_axes: Mapping[JointKey, int],
    ) -> str:
        for key in keys:
            if self.joints[key].where in self.modes:
                return self.modes[self.joints[key].where]
        if inner_shut:
            return "outer"
        outer, inner = sides[0]
        if any(len({each.axes for each in self.derived[key]}) == 1 for key in keys):  # attention: heads by dimensions
            return "outer" if self.heads == "whole" or (outer > inner and self._read(outer_axes)) else "inner"
        return "outer" if outer > inner else "inner"

    def _read(self, outer_axes: Mapping[JointKey, int]) -> bool:
        """Are the outer slices channels of a weight, one to one?

        What maxout leaves of its pieces are channels of the next layer; what is left of heads are scores.
        """
        if self.heads == "dim":
            return False
        for key, axis in outer_axes.items():
            for each in self.derived[key]:
                wanted = np.unique(self.atoms.find(each.targets))
                if each.axes != (axis,) or len(wanted) != len(each.targets):
                    continue
                for value in self.trace.weights.values():
                    for core in value.layers:
                        if core.numel() == len(wanted) and np.array_equal(
                            np.unique(self.atoms.find(core.numpy().reshape(-1))), wanted
                        ):
                            return True
        return False

    def _freeze(self, atoms: Ids) -> None:
        self.atoms.freeze(atoms, "neither whole heads nor parts of each can go")

    def _level(self, key: JointKey, axis: int, levels: dict[tuple[str, int], Ids]) -> None:
        """One number in the module sizes what queries, keys and values have in a head: they shrink in step."""
        joint = self.joints[key]
        mine = np.moveaxis(joint.atoms, axis, 0).reshape(joint.atoms.shape[axis], -1)[:, 0]
        first = levels.setdefault((joint.where, len(mine)), mine)
        if not np.array_equal(self.atoms.find(first), self.atoms.find(mine)):
            self.ties.append(Tie(mine, first, 1, one=True))

    def _tie(self, key: JointKey, axis: int, factor: int) -> None:
        """A head's size, or how many there are, is computed from the width of what comes in: both shrink in step."""
        joint = self.joints[key]
        narrow = self.atoms.find(np.moveaxis(joint.atoms, axis, 0).reshape(joint.atoms.shape[axis], -1)[:, 0])
        narrow = np.unique(narrow)  # a batch folded into the heads repeats them
        mine = set(np.unique(self.atoms.find(joint.atoms)).tolist())
        for operation in self.trace.operations:
            if not f"{operation.path}.".startswith(f"{joint.where}." if joint.where else ""):
                continue
            for value in operation.inputs:
                for core in value.layers:
                    if core.numel() == factor * len(narrow) and max(core.shape) == core.numel():
                        wide = np.unique(self.atoms.find(core.numpy().reshape(-1)))
                        if len(wide) == core.numel() and not mine & set(wide.tolist()):
                            self.ties.append(Tie(wide, narrow, factor))
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
