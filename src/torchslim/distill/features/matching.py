"""Pairs of student and teacher features, named by the user or matched automatically."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torchslim.distill.features.align import Shape
from torchslim.distill.features.taps import Tap
from torchslim.errors import DistillError

BLOCKS = 4  # pairs at most, where they are chosen among similar blocks
SIZES = 2  # at most, of outputs in a module that changes the size; a chain of stages has more
SHARE = 0.02  # of the weights of the heaviest group of blocks, which another group needs to be a stage
FEWER = 1.5  # times fewer tokens make another stage
SAME = 0.9  # the least share of modules that a pruned student has in common with its teacher
INDEXED = re.compile(r"(?P<path>.*)\[(?P<call>-?\d+)\]")
IGNORED = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "DropPath", "StochasticDepth", "Flatten")


@dataclass(frozen=True, slots=True)
class Pair:
    """A student feature, the teacher feature it learns from, and why they are paired."""

    student: Tap
    teacher: Tap
    why: str

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Shapes of both features, (channels, *positions)."""
        return self.student.shape, self.teacher.shape

    def __str__(self) -> str:
        return f"{self.teacher.name} {_size(self.teacher.shape)} to {_size(self.student.shape)}, {self.why}"


def match(student: Sequence[Tap], teacher: Sequence[Tap], taps: Mapping[str, str] | None = None) -> list[Pair]:
    """Pairs of features, shallow ones first.

    Args:
        student: its possible taps, in the order of its forward pass.
        teacher: its possible taps, likewise.
        taps: teacher patterns by student pattern. A pattern is a module's path, where `*` stands for one part of the
            path or some of its letters, or "path[2]" for the third call of a module. Several matches are paired in
            order; if their numbers differ, evenly spaced ones, the last with the last. None: by name if the student
            was pruned from the teacher, else by stages.

    Raises:
        DistillError: a pattern matches nothing.
    """
    return [_together(pair) for pair in _matched(student, teacher, taps)]


def _matched(student: Sequence[Tap], teacher: Sequence[Tap], taps: Mapping[str, str] | None) -> list[Pair]:
    if taps:
        pairs = [pair for ours, theirs in taps.items() for pair in _asked(student, teacher, ours, theirs)]
        order = {tap: number for number, tap in enumerate(student)}
        return sorted(pairs, key=lambda pair: order[pair.student])
    chosen, alike = _stages(teacher)
    most = BLOCKS if alike else len(chosen)
    by_name = {(tap.path, tap.call): tap for tap in student}
    if _is_pruned(student, teacher):
        named = [(by_name.get((tap.path, tap.call)), tap) for tap in _evenly(chosen, min(most, len(chosen)))]
        return [Pair(namesake, tap, "same name") for namesake, tap in named if namesake is not None]
    stages, student_alike = _stages(student)
    return _by_stage(stages, chosen, BLOCKS if alike or student_alike else len(chosen))


def _together(pair: Pair) -> Pair:
    """The pair with image tokens as maps next to a map or other patches; without class tokens if one side has more."""
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


def _asked(student: Sequence[Tap], teacher: Sequence[Tap], student_pattern: str, teacher_pattern: str) -> list[Pair]:
    ours, theirs = _named(student, student_pattern, "student"), _named(teacher, teacher_pattern, "teacher")
    count = min(len(ours), len(theirs))
    return [Pair(tap, goal, "as asked") for tap, goal in zip(_evenly(ours, count), _evenly(theirs, count), strict=True)]


def _named(taps: Sequence[Tap], pattern: str, side: str) -> list[Tap]:
    """Taps that a pattern matches; of a module that is called several times, the last call unless it gives an index."""
    indexed = INDEXED.fullmatch(pattern)
    path, call = (indexed["path"], int(indexed["call"])) if indexed else (pattern, -1)
    matching = [
        tap
        for tap in taps
        if tap.call == (call % tap.calls if -tap.calls <= call < tap.calls else None)
        and len(tap.path.split(".")) == len(path.split("."))
        and all(fnmatchcase(*parts) for parts in zip(tap.path.split("."), path.split("."), strict=True))
    ]
    if not matching:
        paths = {tap.path.lower(): tap.path for tap in taps}
        near = difflib.get_close_matches(path.lower(), paths, n=3, cutoff=0.4) or list(paths)[:5]
        raise DistillError(
            f"tap {pattern!r} matches no output of the {side} that can be a feature (a tensor of floats with the batch "
            f"in it); near names: {', '.join(paths[name] for name in near)}"
        )
    return matching


def _is_pruned(student: Sequence[Tap], teacher: Sequence[Tap]) -> bool:
    """Do both have nearly the same modules, with equal positions?"""
    theirs = {(tap.path, tap.call): tap.positions for tap in teacher}
    same = sum(theirs.get((tap.path, tap.call)) == tap.positions for tap in student)
    return same > 0 and same >= SAME * max(len(student), len(teacher))


def _by_stage(student: list[Tap], teacher: list[Tap], most: int) -> list[Pair]:
    """Pairs of stages of equal size; if there are none, of evenly spaced stages, the last with the last."""
    sizes = {tap.positions: tap for tap in student}
    distinct = len(sizes) == len(student) > 1 or len({tap.positions for tap in teacher}) == len(teacher) > 1
    pairs = [Pair(sizes[tap.positions], tap, "same size") for tap in teacher if tap.positions in sizes]
    if distinct and pairs:
        return pairs
    count = min(len(student), len(teacher), most)
    evenly = zip(_evenly(student, count), _evenly(teacher, count), strict=True)
    return [Pair(left, right, "same place") for left, right in evenly]


def _stages(taps: Sequence[Tap]) -> tuple[list[Tap], bool]:
    """Last output of each size; or similar blocks, if all have one size. And whether they are similar blocks."""
    usable = [tap for tap in taps if tap.kind not in IGNORED]
    rank = _rank(usable)
    usable = [tap for tap in usable if len(tap.positions) == rank]
    several = rank > 0 and len({tap.positions for tap in usable}) > 1
    # an output with a single position is a pooled vector, not a stage
    wide = [tap for tap in usable if not several or set(tap.positions) != {1}] or usable
    last, groups = _ends(wide, usable), _blocks(wide)
    if rank > 1 and len(last) > 1:
        return last, False
    if rank == 1 and (stages := _stages_of_tokens(groups)):
        return stages, False
    return (groups[0], True) if groups else (last, False)


def _stages_of_tokens(groups: Sequence[Sequence[Tap]]) -> list[Tap]:
    """Last block of each number of tokens, if there are several numbers; a class token more makes no new number."""
    ends: dict[int, Tap] = {}
    for group in groups:
        count = group[0].positions[0]
        if all(max(count, earlier) >= FEWER * min(count, earlier) for earlier in ends):
            ends[count] = group[-1]
    return [ends[count] for count in sorted(ends, reverse=True)] if len(ends) > 1 else []


def _rank(taps: Sequence[Tap]) -> int:
    """Number of dimensions of positions of a network's features; 0 only if most layers with weights have none.

    Of several numbers, the one whose modules hold most weights: blocks of maps may work on tokens inside.
    """
    weighty = [tap for tap in taps if tap.weights] or list(taps)
    ranks = [len(tap.positions) for tap in weighty]
    if not ranks or 2 * ranks.count(0) > len(ranks):
        return 0
    totals = {
        rank: sum(tap.weights for tap in _outermost([layer for layer in weighty if len(layer.positions) == rank]))
        for rank in sorted({*ranks} - {0})
    }
    return max(reversed(totals), key=lambda rank: totals[rank])


def _outermost(taps: Sequence[Tap]) -> list[Tap]:
    """First calls of the modules that lie in none of the others."""
    paths = {tap.path for tap in taps}
    return [tap for tap in taps if tap.call == 0 and not any(above in paths for above in _above(tap.path))]


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _ends(taps: Sequence[Tap], everything: Sequence[Tap]) -> list[Tap]:
    """Last output of each size; outputs inside a module that changes the size count only if there are no others.

    A module with several sizes inside is a chain of stages, not a module that changes the size.
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
    """Groups of at least two outputs of sibling modules of one class and size, heaviest first, light groups left out.

    If the modules of the first group are stacks of blocks, such as an encoder and a decoder, their blocks replace them.
    """
    groups: dict[tuple[str, str, Shape], list[Tap]] = {}
    for tap in taps:
        if tap.weights:
            groups.setdefault((tap.path.rpartition(".")[0], tap.kind, tap.positions), []).append(tap)
    blocks = sorted((group for group in groups.values() if len(group) > 1), key=_held, reverse=True)
    if not blocks:
        return []
    compound = {above for tap in taps if tap.weights for above in _above(tap.path)}
    inner = [
        group
        for group in blocks[1:]
        if all(tap.path in compound and tap.path.split(".")[-1].isdigit() for tap in group)
    ]
    stacks = [
        [
            tap
            for group in inner
            if group[0].path.startswith(f"{outer.path}.") and _held(group) >= outer.weights / 2
            for tap in group
        ]
        for outer in blocks[0]
    ]
    if all(stacks):
        blocks[0] = [tap for stack in stacks for tap in stack]
    return [group for group in blocks if _held(group) >= SHARE * _held(blocks[0])]


def _held(taps: Sequence[Tap]) -> int:
    return sum(tap.weights for tap in taps)


def _evenly(taps: Sequence[Tap], count: int) -> list[Tap]:
    """`count` of the taps at equal distances, the last one included."""
    return [taps[round((number + 1) * len(taps) / count) - 1] for number in range(count)]


def _size(shape: Shape) -> str:
    return "x".join(map(str, shape))
