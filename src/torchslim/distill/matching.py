"""Which feature of the student learns from which of the teacher: as it is asked for, or found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torchslim.distill.align import Shape
from torchslim.distill.taps import Tap
from torchslim.errors import DistillError

BLOCKS = 4  # pairs that are chosen among blocks that are alike
SAME = 0.9  # the share of the modules that a pruned student has in common with its teacher
INDEXED = re.compile(r"(?P<path>.*)\[(?P<call>-?\d+)\]")
IGNORED = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "DropPath", "StochasticDepth", "Flatten")


@dataclass(frozen=True, slots=True)
class Pair:
    """A feature of the student, the teacher's that it learns from, and why these two."""

    student: Tap
    teacher: Tap
    why: str

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Of both, (channels, *positions)."""
        return self.student.shape, self.teacher.shape

    def __str__(self) -> str:
        return f"{self.teacher.name} {_size(self.teacher.shape)} to {_size(self.student.shape)}, {self.why}"


def match(student: Sequence[Tap], teacher: Sequence[Tap], taps: Mapping[str, str] | None = None) -> list[Pair]:
    """The pairs, shallow ones first.

    Args:
        student: what can be tapped of it, in the order of its forward pass.
        teacher: likewise.
        taps: patterns by pattern, student's to teacher's: a module's path, where `*` stands for one part of it or some
            of its letters, or "path[2]" for the third call of a module. Where both name several, they are paired in
            order; where they name different numbers, evenly spaced ones, the last with the last. None: by name where
            the student is the teacher pruned, else by stages.

    Raises:
        DistillError: a pattern that matches nothing, or nothing to match.
    """
    return [_together(pair) for pair in _matched(student, teacher, taps)]


def _matched(student: Sequence[Tap], teacher: Sequence[Tap], taps: Mapping[str, str] | None) -> list[Pair]:
    if taps:
        pairs = [pair for left, right in taps.items() for pair in _asked(student, teacher, left, right)]
        order = {tap: number for number, tap in enumerate(student)}
        return sorted(pairs, key=lambda pair: order[pair.student])
    chosen, alike = _stages(teacher)
    most = BLOCKS if alike else len(chosen)
    by_name = {(tap.path, tap.call): tap for tap in student}
    if _is_pruned(student, teacher):
        named = [(by_name.get((tap.path, tap.call)), tap) for tap in _evenly(chosen, min(most, len(chosen)))]
        return [Pair(left, right, "same name") for left, right in named if left is not None]
    ours, ours_alike = _stages(student)
    return _by_stage(ours, chosen, BLOCKS if alike or ours_alike else len(chosen))


def _together(pair: Pair) -> Pair:
    """Of other numbers of tokens, those that are no part of the image or of the sequence are left out."""
    both = pair.student, pair.teacher
    lengths = [tap.positions for tap in both]
    if len(lengths[0]) == len(lengths[1]) == 1 and lengths[0] != lengths[1]:
        if all(tap.patches for tap in both):
            return replace(pair, student=both[0].on_grid(), teacher=both[1].on_grid())
        extra = [tap.padding.extra for tap in both if tap.padding is not None and tap.padding.extra is not None]
        if len(extra) == 2 and extra[0] != extra[1]:
            return replace(pair, student=both[0].without_first(), teacher=both[1].without_first())
    return pair


def _asked(student: Sequence[Tap], teacher: Sequence[Tap], left: str, right: str) -> list[Pair]:
    ours, theirs = _named(student, left, "student"), _named(teacher, right, "teacher")
    count = min(len(ours), len(theirs))
    return [Pair(a, b, "as asked") for a, b in zip(_evenly(ours, count), _evenly(theirs, count), strict=True)]


def _named(taps: Sequence[Tap], pattern: str, side: str) -> list[Tap]:
    """What a pattern names; of a module that is called several times the last call, unless it says which."""
    indexed = INDEXED.fullmatch(pattern)
    path, call = (indexed["path"], int(indexed["call"])) if indexed else (pattern, -1)
    found = [
        tap for tap in taps if tap.call == (call % tap.calls if -tap.calls <= call < tap.calls else None)
        and len(tap.path.split(".")) == len(path.split("."))
        and all(fnmatchcase(*parts) for parts in zip(tap.path.split("."), path.split("."), strict=True))
    ]  # fmt: skip
    if not found:
        known = {tap.path.lower(): tap.path for tap in taps}
        near = difflib.get_close_matches(path.lower(), known, n=3, cutoff=0.4) or list(known)[:5]
        raise DistillError(
            f"tap {pattern!r} matches no output of the {side} that can be a feature (a tensor of floats with the batch "
            f"in it); near names: {', '.join(known[each] for each in near)}"
        )
    return found


def _is_pruned(student: Sequence[Tap], teacher: Sequence[Tap]) -> bool:
    """Have both nearly the same modules, with as many positions?"""
    theirs = {(tap.path, tap.call): tap.positions for tap in teacher}
    same = sum(theirs.get((tap.path, tap.call)) == tap.positions for tap in student)
    return same > 0 and same >= SAME * max(len(student), len(teacher))


def _by_stage(student: list[Tap], teacher: list[Tap], most: int) -> list[Pair]:
    """Stages of equal size; where there are none, evenly spaced ones, the last with the last."""
    sizes = {tap.positions: tap for tap in student}
    distinct = len(sizes) == len(student) > 1 or len({tap.positions for tap in teacher}) == len(teacher) > 1
    pairs = [Pair(sizes[tap.positions], tap, "same size") for tap in teacher if tap.positions in sizes]
    if distinct and pairs:
        return pairs
    count = min(len(student), len(teacher), most)
    both = zip(_evenly(student, count), _evenly(teacher, count), strict=True)
    return [Pair(left, right, "same place") for left, right in both]


def _stages(taps: Sequence[Tap]) -> tuple[list[Tap], bool]:
    """The last output of each size; or blocks that are alike, where all are of one size."""
    usable = [tap for tap in taps if tap.kind not in IGNORED]
    weighty = [len(tap.positions) for tap in usable if tap.weights]
    ranks = weighty or [len(tap.positions) for tap in usable]
    if not ranks:
        return [], False
    rank = max(sorted(set(ranks)), key=ranks.count)
    usable = [tap for tap in usable if len(tap.positions) == rank]
    if rank > 0 and len({tap.positions for tap in usable}) > 1:
        # what has one position left is a pooled vector, not a stage
        usable = [tap for tap in usable if set(tap.positions) != {1}] or usable
    last = _ends(usable)
    if rank > 1 and len(last) > 1:
        return last, False
    blocks = _blocks(usable)
    return (blocks, True) if blocks else (last, False)


def _ends(taps: Sequence[Tap]) -> list[Tap]:
    """The last output of each size; one inside a module that changes the size is not its end, if there are others."""
    inner = {tap: sum(sizes != {tap.positions} for sizes in _around(tap, taps)) for tap in taps}
    least = {tap.positions: inner[tap] for tap in sorted(taps, key=lambda tap: -inner[tap])}
    last = {tap.positions: tap for tap in taps if inner[tap] == least[tap.positions]}
    return [tap for tap in taps if last[tap.positions] is tap]


def _around(tap: Tap, taps: Sequence[Tap]) -> list[set[Shape]]:
    """The sizes that each module around it puts out."""
    sizes: dict[str, set[Shape]] = {}
    for each in taps:
        if tap.path.startswith(f"{each.path}."):
            sizes.setdefault(each.path, set()).add(each.positions)
    return list(sizes.values())


def _blocks(taps: Sequence[Tap]) -> list[Tap]:
    """The outputs of modules of one class in one place that hold most of the weights, at least two of them."""
    groups: dict[tuple[str, str, Shape], list[Tap]] = {}
    for tap in taps:
        if tap.weights:
            groups.setdefault((tap.path.rpartition(".")[0], tap.kind, tap.positions), []).append(tap)
    found = [group for group in groups.values() if len(group) > 1]
    return max(found, key=lambda group: sum(tap.weights for tap in group), default=[])


def _evenly(taps: Sequence[Tap], count: int) -> list[Tap]:
    """So many of them, at equal distances, the last one among them."""
    return [taps[round((number + 1) * len(taps) / count) - 1] for number in range(count)]


def _size(shape: Shape) -> str:
    return "x".join(map(str, shape))
