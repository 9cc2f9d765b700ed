"""Which feature of the student learns from which of the teacher: as it is asked for, or found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torchslim.distill.features.align import Shape
from torchslim.distill.features.taps import Tap
from torchslim.errors import DistillError

BLOCKS = 4  # pairs that are chosen among blocks that are alike
SIZES = 2  # inside a module that goes from one to the next; a chain of stages has more
SHARE = 0.02  # of the weights of the heaviest group of blocks that another one must have to be a stage
FEWER = 1.5  # times fewer tokens are another stage
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
    """Tokens of an image next to a map, or of other patches, as maps; without class tokens where one side has more."""
    student, teacher = pair.student, pair.teacher
    ranks = len(student.positions), len(teacher.positions)
    if student.positions == teacher.positions or 1 not in ranks:
        return pair
    if ranks == (1, 1) and not (student.patches and teacher.patches):
        extra = [tap.padding.extra for tap in (student, teacher) if tap.padding is not None]
        if len(extra) == 2 and None not in extra and extra[0] != extra[1]:
            return replace(pair, student=student.without_first(), teacher=teacher.without_first())
    elif ranks in ((1, 1), (1, 2), (2, 1)):
        both = [tap.on_grid() if tap.patches and len(tap.positions) == 1 else tap for tap in (student, teacher)]
        return replace(pair, student=both[0], teacher=both[1])
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
        tap
        for tap in taps
        if tap.call == (call % tap.calls if -tap.calls <= call < tap.calls else None)
        and len(tap.path.split(".")) == len(path.split("."))
        and all(fnmatchcase(*parts) for parts in zip(tap.path.split("."), path.split("."), strict=True))
    ]
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
    rank = _rank(usable)
    usable = [tap for tap in usable if len(tap.positions) == rank]
    several = rank > 0 and len({tap.positions for tap in usable}) > 1
    # what has one position left is a pooled vector, not a stage
    wide = [tap for tap in usable if not several or set(tap.positions) != {1}] or usable
    last, groups = _ends(wide, usable), _blocks(wide)
    if rank > 1 and len(last) > 1:
        return last, False
    if rank == 1 and (stages := _stages_of_tokens(groups)):
        return stages, False
    return (groups[0], True) if groups else (last, False)


def _stages_of_tokens(groups: Sequence[Sequence[Tap]]) -> list[Tap]:
    """The last block of each number of tokens, where blocks work on several; a class token more does not make one."""
    ends: dict[int, Tap] = {}
    for group in groups:
        count = group[0].positions[0]
        if all(max(count, other) >= FEWER * min(count, other) for other in ends):
            ends[count] = group[-1]
    return [ends[count] for count in sorted(ends, reverse=True)] if len(ends) > 1 else []


def _rank(taps: Sequence[Tap]) -> int:
    """How many dimensions of positions a network's features have; none only where most layers with weights have none.

    Of several the one whose modules hold most weights: blocks of maps may work on tokens inside.
    """
    weighty = [tap for tap in taps if tap.weights] or list(taps)
    ranks = [len(tap.positions) for tap in weighty]
    if not ranks or 2 * ranks.count(0) > len(ranks):
        return 0
    held = {
        rank: sum(tap.weights for tap in _outermost([each for each in weighty if len(each.positions) == rank]))
        for rank in sorted({*ranks} - {0})
    }
    return max(reversed(held), key=lambda rank: held[rank])


def _outermost(taps: Sequence[Tap]) -> list[Tap]:
    """Those that lie in none of the others."""
    paths = {tap.path for tap in taps}
    return [tap for tap in taps if tap.call == 0 and not any(above in paths for above in _above(tap.path))]


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _ends(taps: Sequence[Tap], everything: Sequence[Tap]) -> list[Tap]:
    """The last output of each size; one inside a module that changes the size is not its end, if there are others.

    A module with several sizes inside is a chain of stages, not one that changes the size.
    """
    out: dict[str, set[Shape]] = {}
    inside: dict[str, set[Shape]] = {}
    for tap in everything:
        out.setdefault(tap.path, set()).add(tap.positions)
        for path in _above(tap.path) if tap in taps else ():
            inside.setdefault(path, set()).add(tap.positions)
    inner = {
        tap: sum(
            out.get(path, {tap.positions}) != {tap.positions} and len(inside[path] | out[path]) <= SIZES
            for path in _above(tap.path)
        )
        for tap in taps
    }
    least = {tap.positions: inner[tap] for tap in sorted(taps, key=lambda tap: -inner[tap])}
    last = {tap.positions: tap for tap in taps if inner[tap] == least[tap.positions]}
    return [tap for tap in taps if last[tap.positions] is tap]


def _blocks(taps: Sequence[Tap]) -> list[list[Tap]]:
    """The outputs of modules of one class in one place, at least two: those groups that hold most of the weights.

    Where the first ones are stacks of blocks, as an encoder and a decoder are, these blocks in their place.
    """
    groups: dict[tuple[str, str, Shape], list[Tap]] = {}
    for tap in taps:
        if tap.weights:
            groups.setdefault((tap.path.rpartition(".")[0], tap.kind, tap.positions), []).append(tap)
    found = sorted((group for group in groups.values() if len(group) > 1), key=_held, reverse=True)
    if not found:
        return []
    compound = {above for tap in taps if tap.weights for above in _above(tap.path)}
    inner = [
        group
        for group in found[1:]
        if all(each.path in compound and each.path.split(".")[-1].isdigit() for each in group)
    ]
    stacks = [
        [
            tap
            for group in inner
            if group[0].path.startswith(f"{outer.path}.") and _held(group) >= outer.weights / 2
            for tap in group
        ]
        for outer in found[0]
    ]
    if all(stacks):
        found[0] = [tap for stack in stacks for tap in stack]
    return [group for group in found if _held(group) >= SHARE * _held(found[0])]


def _held(taps: Sequence[Tap]) -> int:
    return sum(tap.weights for tap in taps)


def _evenly(taps: Sequence[Tap], count: int) -> list[Tap]:
    """So many of them, at equal distances, the last one among them."""
    return [taps[round((number + 1) * len(taps) / count) - 1] for number in range(count)]


def _size(shape: Shape) -> str:
    return "x".join(map(str, shape))
