"""Numbers with unit, spread and machine: one type from the timer to the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchslim.errors import TorchslimError

THIS_MACHINE = "this"
"""The key of the machine that a run was made on, in the table of the run's machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A number with its unit; a timed one has a spread over its rounds.

    Args:
        value: the number; the median if there are several rounds.
        unit: "ms", "x", "bytes", ...; "1" for a number without one.
        p10, p90: percentiles of the rounds; both or neither.
        rounds: number of measured rounds.
        machine: a key of the run's machines; "" for a number that does not depend on the machine.
    """

    value: float
    unit: str
    p10: float | None = None
    p90: float | None = None
    rounds: int = 1
    machine: str = ""

    def __post_init__(self) -> None:
        if not _is_number(self.value):
            raise TorchslimError(f"value of a measurement must be a number, got {self.value!r}")
        if not isinstance(self.unit, str) or not isinstance(self.machine, str):
            raise TorchslimError(
                f"unit and machine of a measurement must be texts, got {self.unit!r}, {self.machine!r}"
            )
        if not isinstance(self.rounds, int) or isinstance(self.rounds, bool) or self.rounds < 0:
            raise TorchslimError(f"rounds of a measurement must be a count, got {self.rounds!r}")
        spread = (self.p10, self.p90)
        if spread != (None, None) and not all(map(_is_number, spread)):
            raise TorchslimError(f"p10 and p90 of a measurement must both be numbers, or neither, got {spread!r}")

    def to_dict(self) -> dict[str, Any]:
        """The measurement as stored in run.json and search.json."""
        written: dict[str, Any] = {"value": self.value, "unit": self.unit, "repeats": self.rounds}
        if self.p10 is not None:
            written |= {"low": self.p10, "high": self.p90}
        return written | ({"machine": self.machine} if self.machine else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup(Measurement):
    """Speed-up over the baseline, from paired rounds."""

    unit: str = "x"

    @property
    def verdict(self) -> str:
        """ "faster", "slower", or "no difference" if the spread includes 1."""
        if self.p10 is not None and self.p90 is not None and self.p10 <= 1 <= self.p90:
            return "no difference"
        return "faster" if self.value > 1 else "slower"

    def to_dict(self) -> dict[str, Any]:
        """The speed-up as stored in run.json, with its verdict."""
        return Measurement.to_dict(self) | {"verdict": self.verdict}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
