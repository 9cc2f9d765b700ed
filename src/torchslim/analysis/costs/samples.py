"""Measured programs: the time of the whole, and the share of each module in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchslim.analysis.costs.layout import INPUT
from torchslim.analysis.costs.programs import Choice
from torchslim.runtimes.kernel_times import KernelTime

CLOCK_MS = 0.0015
"""What the profiler itself adds to each kernel's time."""

LEAST_MS = 0.0002
"""Least time of a kernel after `CLOCK_MS` is taken off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured program. Times are relative to the reference's: the full-width float program.

    Attributes:
        choice: the widths and schemes.
        ratio, low, high: the time over the reference's from paired rounds: median, 10th and 90th percentile.
        size_bytes: bytes of the runtime's files; 0 if it has none.
        own: by module, the share of its kernels in the program's time, in the unit of `ratio`; empty without profiler.
        moves: by module, the share of the kernels that pass its output on: casts and changes of layout; likewise.
    """

    choice: Choice
    ratio: float
    low: float
    high: float
    size_bytes: int = 0
    own: Mapping[str, float] = field(default_factory=dict)
    moves: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The sample as plain values."""
        return {
            "kept": list(self.choice.kept),
            "schemes": dict(self.choice.schemes),
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "size_bytes": self.size_bytes,
            "own": dict(self.own),
            "moves": dict(self.moves),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        """The inverse of `to_dict`."""
        values = {name: data[name] for name in ("ratio", "low", "high", "size_bytes", "own", "moves")}
        return cls(choice=Choice(kept=tuple(data["kept"]), schemes=data["schemes"]), **values)


def shares(
    kernels: Sequence[KernelTime], paths: Collection[str], ratio: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Split a program's time among its modules as its kernels' times are: kernels of a module, and those behind it.

    Profiles and whole programs are timed one after the other on a machine whose speed drifts, so the profile gives
    the shares, and the paired rounds give their sum.

    Args:
        kernels: all kernels; a node's name is its module's path, a slash and its operation.
        paths: of the modules that run operations.
        ratio: what the shares add up to.

    Returns:
        Shares by module of its own kernels, and of kernels without a module that read its output. A kernel that reads
        constants alone, as where weights become floats in every call, belongs to the module that reads its result.
    """
    net = [max(kernel.ms - CLOCK_MS, LEAST_MS) if kernel.ms else 0.0 for kernel in kernels]
    unit = ratio / sum(net) if any(net) else 0.0
    readers = {place: number for number, kernel in reversed([*enumerate(kernels)]) for place in kernel.before}
    owners: list[str] = []
    own: dict[str, float] = {}
    moves: dict[str, float] = {}
    for number, (kernel, ms) in enumerate(zip(kernels, net, strict=True)):
        path, slash, _ = kernel.node.rpartition("/")
        if not kernel.before and path not in paths:
            last = number
            while last in readers and kernels[last].node.rpartition("/")[0] not in paths:
                last = readers[last]
            path = kernels[last].node.rpartition("/")[0]
        if slash and path in paths:
            part = own
        else:
            part, path = moves, next((owners[place] for place in kernel.before if 0 <= place < number), INPUT)
        owners.append(path)
        part[path] = part.get(path, 0.0) + ms * unit
    return own, moves
