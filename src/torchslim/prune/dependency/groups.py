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


def _counted(roots: Ids) -> dict[int, int]:
    values, counts = np.unique(roots, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def collect_units(
    trace: Trace, atoms: Atoms, groups: list[Group], ties: Sequence[Tie], placed: Collection[bytes] = ()
) -> list[Unit]:
    """Free groups, split into cells by what must stay in balance, and tied where they must shrink in step."""
    frozen = atoms.frozen()
    labels, bound = _balanced(trace, atoms, placed)
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
    for own in bound:
        # one class from each cell: every part must lose equally many of its elements
        losses = [{(cell_of.get(root, -1), count) for root, count in part.items()} for part in own]
        mine = sorted({place for loss in losses for place, _ in loss})
        if mine[:1] == [-1] or len({sum(count for _, count in loss) for loss in losses}) > 1:
            stuck |= {root for part in own for root in part}
        else:
            links.union(places[np.array(mine)], places[np.array(mine[:1])])
    for tie in ties:
        ends = [atoms.find(each).tolist() for each in (tie.wide, tie.narrow)]
        wide, narrow = (sorted({cell_of[root] for root in end if root in cell_of}) for end in ends)
        if len(wide) != 1 or len(narrow) != 1:
            stuck |= {*ends[1], *(ends[0] if narrow or tie.one else ())}
            continue
        stride[wide[0]] = max(stride[wide[0]], tie.factor)
        links.union(places[wide], places[narrow])
    together: dict[int, list[int]] = {}
    for place, kind in enumerate(links.find(places).tolist()):
        together.setdefault(kind, []).append(place)
    units = [
        Unit(
            tuple(Cell(np.array(cells[keys[place]]), stride[place]) for place in inside),
            tuple(sorted({keys[place][0] for place in inside})),
        )
        for inside in together.values()
        if not any(root in stuck for place in inside for root in cells[keys[place]])
    ]
    return [unit for unit in units if unit.width > 1]


Labels = dict[int, list[tuple[int, ...]]]


def _balanced(trace: Trace, atoms: Atoms, placed: Collection[bytes]) -> tuple[Labels, list[list[dict[int, int]]]]:
    """Per class the parts of each balance that it is in, and per balance its parts: classes and how often they occur.

    Classes that all parts share alike are left out, as no removal of them upsets the balance.
    """
    frozen = atoms.frozen()
    labels: Labels = {}
    bound = []
    for number, (key, balance) in enumerate(trace.tagger.balances.items()):
        if key in placed:
            continue
        parts = [_counted(atoms.find(part)) for part in balance.parts]
        inside: dict[int, list[int]] = {}
        for index, part in enumerate(parts):
            for root in part:
                inside.setdefault(root, []).append(index)
        shared = {
            root
            for root, where in inside.items()
            if frozen[root] or (len(where) == len(parts) and len({part[root] for part in parts}) == 1)
        }
        own = [{root: count for root, count in part.items() if root not in shared} for part in parts]
        if any(own):
            bound.append(own)
            for root, where in inside.items():
                if root not in shared:
                    labels.setdefault(root, []).append((number, *where))
    return labels, bound
