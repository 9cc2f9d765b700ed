"""Groups of channels that are alike, and units of groups that must shrink in step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from torchslim.prune.dependency.resolve import Tie
from torchslim.prune.dependency.trace import Trace
from torchslim.prune.dependency.union_find import Atoms, Ids


@dataclass(frozen=True)
class Member:
    """One dimension of one weight in a group, with the class of each index."""

    weight: str
    dim: int
    indices: Ids  # positions along the dimension
    classes: Ids  # the class of each index, as its place in `Group.classes`


@dataclass(frozen=True)
class Group:
    """Channels that are alike: every class holds one or more slices of every member."""

    classes: Ids
    members: tuple[Member, ...]
    reason: str  # why the group must stay; empty if its classes can be removed

    @property
    def name(self) -> str:
        """The first member, as `weight[dim]`."""
        return f"{self.members[0].weight}[{self.members[0].dim}]"


@dataclass(frozen=True)
class Cell:
    """Classes of which `stride` are removed at each step of their unit."""

    classes: Ids
    stride: int = 1


@dataclass(frozen=True)
class Unit:
    """Cells that shrink in step."""

    cells: tuple[Cell, ...]
    groups: tuple[int, ...]  # indices into `Coupling.groups`

    @property
    def width(self) -> int:
        """Number of steps, of which one must stay."""
        return min(len(cell.classes) // cell.stride for cell in self.cells)


def _counted(roots: Ids) -> dict[int, int]:
    values, counts = np.unique(roots, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def collect_units(
    trace: Trace, atoms: Atoms, groups: list[Group], ties: Sequence[Tie], placed: Collection[bytes] = ()
) -> list[Unit]:
    """Units of the free groups: balances split groups into cells, and cells that must shrink in step share a unit."""
    frozen = atoms.frozen()
    labels, balances = _balanced(trace, atoms, placed)
    cells: dict[tuple[int, tuple[tuple[int, ...], ...]], list[int]] = {}
    for number, group in enumerate(groups):
        for root in group.classes.tolist():
            if not group.reason and not frozen[root]:
                cells.setdefault((number, tuple(labels.get(root, ()))), []).append(root)
    keys = list(cells)
    links = Atoms()
    places = links.fresh(len(keys))
    cell_of = {root: place for place, key in enumerate(keys) for root in cells[key]}
    stride = [1] * len(keys)
    stuck: set[int] = set()
    for parts in balances:
        # if every cell loses one class, all parts must lose equally many elements
        losses = [{(cell_of.get(root, -1), count) for root, count in part.items()} for part in parts]
        balanced_cells = sorted({place for loss in losses for place, _ in loss})
        if balanced_cells[:1] == [-1] or len({sum(count for _, count in loss) for loss in losses}) > 1:
            stuck |= {root for part in parts for root in part}
        else:
            links.union(places[np.array(balanced_cells)], places[np.array(balanced_cells[:1])])
    for tie in ties:
        ends = [atoms.find(classes).tolist() for classes in (tie.wide, tie.narrow)]
        wide, narrow = (sorted({cell_of[root] for root in end if root in cell_of}) for end in ends)
        if len(wide) != 1 or len(narrow) != 1:
            stuck |= {*ends[1], *(ends[0] if narrow or tie.one else ())}
            continue
        stride[wide[0]] = max(stride[wide[0]], tie.factor)
        links.union(places[wide], places[narrow])
    linked: dict[int, list[int]] = {}
    for place, link in enumerate(links.find(places).tolist()):
        linked.setdefault(link, []).append(place)
    units = [
        Unit(
            tuple(Cell(np.array(cells[keys[place]]), stride[place]) for place in unit_places),
            tuple(sorted({keys[place][0] for place in unit_places})),
        )
        for unit_places in linked.values()
        if not any(root in stuck for place in unit_places for root in cells[keys[place]])
    ]
    return [unit for unit in units if unit.width > 1]


Labels = dict[int, list[tuple[int, ...]]]


def _balanced(trace: Trace, atoms: Atoms, placed: Collection[bytes]) -> tuple[Labels, list[list[dict[int, int]]]]:
    """Per class its balances, each with the parts that hold the class; per balance its parts, as counts of classes.

    Left out are frozen classes, and classes that occur equally often in all parts: removing these keeps the balance.
    """
    frozen = atoms.frozen()
    labels: Labels = {}
    balances = []
    for number, (key, balance) in enumerate(trace.tagger.balances.items()):
        if key in placed:
            continue
        parts = [_counted(atoms.find(part)) for part in balance.parts]
        parts_of: dict[int, list[int]] = {}
        for index, part in enumerate(parts):
            for root in part:
                parts_of.setdefault(root, []).append(index)
        shared = {
            root
            for root, indices in parts_of.items()
            if frozen[root] or (len(indices) == len(parts) and len({part[root] for part in parts}) == 1)
        }
        unshared = [{root: count for root, count in part.items() if root not in shared} for part in parts]
        if any(unshared):
            balances.append(unshared)
            for root, indices in parts_of.items():
                if root not in shared:
                    labels.setdefault(root, []).append((number, *indices))
    return labels, balances
