"""Measured programs: the time of the whole, and the share of each module in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchslim.analysis.costs.layout import INPUT, Layout
from torchslim.analysis.costs.programs import Choice
from torchslim.runtimes.kernel_times import KernelTime


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured program. Times are relative to the reference's: the full-width float program.

    Attributes:
        choice: the widths and schemes.
        ratio: the time over the reference's.
        size_bytes: bytes of the runtime's files; 0 if it has none.
        own: by module, the share of its kernels in the program's time, in the unit of `ratio`; empty without profiler.
        moves: by module, the share of the kernels that pass its output on: casts and changes of layout; likewise.
        integer: modules with kernels that compute on integers.
    """

    choice: Choice
    ratio: float
    size_bytes: int = 0
    own: Mapping[str, float] = field(default_factory=dict)
    moves: Mapping[str, float] = field(default_factory=dict)
    integer: frozenset[str] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """The sample as plain values."""
        return {
            "kept": list(self.choice.kept),
            "schemes": dict(self.choice.schemes),
            "ratio": self.ratio,
            "size_bytes": self.size_bytes,
            "own": dict(self.own),
            "moves": dict(self.moves),
            "integer": sorted(self.integer),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        """The inverse of `to_dict`."""
        values = {name: data[name] for name in ("ratio", "size_bytes", "own", "moves")}
        choice = Choice(kept=tuple(data["kept"]), schemes=data["schemes"])
        return cls(choice=choice, integer=frozenset(data["integer"]), **values)


@dataclass(frozen=True, slots=True)
class Shares:
    """A program's time by module: its own kernels, those that pass its output on, and which compute on integers."""

    own: Mapping[str, float]
    moves: Mapping[str, float]
    integer: frozenset[str]


def shares(kernels: Sequence[KernelTime], owner: Callable[[str], str | None], ratio: float) -> Shares:
    """Split a program's time among its modules as its kernels' times are: kernels of a module, and those behind it.

    Profiles and whole programs are timed one after the other on a machine whose speed drifts, so the profile gives
    the shares, and the paired rounds give their sum. A kernel that reads constants alone, as where weights become
    floats in every call, belongs to the module that reads its result.

    Args:
        kernels: all kernels.
        owner: the path of the module of a node, by the node's name; None for casts and changes of layout, which pass on
            the output of the module before them.
        ratio: what the shares add up to.
    """
    whole = sum(kernel.ms for kernel in kernels)
    unit = ratio / whole if whole else 0.0
    readers = {place: number for number, kernel in reversed([*enumerate(kernels)]) for place in kernel.before}
    owners: list[str] = []
    own: dict[str, float] = {}
    moves: dict[str, float] = {}
    integer: set[str] = set()
    for number, kernel in enumerate(kernels):
        path = owner(kernel.node)
        last = number
        while path is None and not kernel.before and last in readers:
            last = readers[last]
            path = owner(kernels[last].node)
        if path is not None:
            part = own
            if kernel.integer:
                integer.add(path)
        else:
            part, path = moves, next((owners[place] for place in kernel.before if 0 <= place < number), INPUT)
        owners.append(path)
        part[path] = part.get(path, 0.0) + kernel.ms * unit
    return Shares(own, moves, frozenset(integer))


def observed(layout: Layout, samples: Sequence[Sample]) -> Layout:
    """The layout with the modules that computed on floats although values on a grid came in, in most samples.

    A module with operations at several stations, such as one activation for several layers, may have a kernel at one of
    them in a few samples.
    """
    on_grid: Counter[str] = Counter()
    running: Counter[str] = Counter()
    for sample in samples:
        for path in layout.paths - set(layout.layers):
            if layout.grid(layout.station(path), sample.choice.schemes) == "static":
                on_grid[path] += 1
                running[path] += sample.own.get(path, 0.0) > 0
    integer = frozenset[str]().union(*(sample.integer for sample in samples))
    return replace(layout, floats=frozenset(path for path in running if 2 * running[path] > on_grid[path]) - integer)
