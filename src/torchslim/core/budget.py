"""What the user wants: bounds that a compressed model must keep, and what is to be as small as can be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from torchslim.core.checks import Range, check_fields
from torchslim.errors import RecipeError

Objective = Literal["metric_drop", "latency", "size", "peak_memory", "macs", "params"]

BOUNDS: Mapping[str, str] = {  # what each bound is a bound of
    "metric_drop": "metric_drop",
    "latency_ms": "latency",
    "size_mb": "size",
    "peak_memory_mb": "peak_memory",
    "macs": "macs",
    "params": "params",
}
UNITS: Mapping[str, str] = {
    "metric_drop": "",
    "latency": "ms",
    "size": "MB",
    "peak_memory": "MB",
    "macs": "MACs",
    "params": "parameters",
}

Count = Annotated[float, Range(-1e18, 1e18)]
"""So many of what large models have many of."""

MOST = 10**6  # trials


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds, objectives, and how long to look for them.

    Args:
        metric_drop: how much worse than the original the metric may be on val, in the metric's own unit: 0.5 is half a
            point of an accuracy in per cent.
        latency_ms: of one sample a call on the runtime, in milliseconds.
        size_mb: of the files that ship, in megabytes (10**6 bytes).
        peak_memory_mb: by how much loading and running the artifact raises a process's memory at most, in megabytes.
        macs: multiply-accumulates of a sample.
        params: how many numbers the model holds.
        minimize: what is to be small; by default the metric's drop and whatever else is bounded, or the latency where
            nothing else is.
        trials: how many to take; those that a killed worker lost do not count.
        finalists: how many of the best are trained fully and measured as artifacts; up to twice as many while none of
            them keeps the bounds. Of those that train nothing and keep the bounds, as many come on top, where no other
            of them is better.
        short: the share of its training that a trial gets before.
        hours: after which no further trial begins; None: no limit.
    """

    metric_drop: float | None = None
    latency_ms: float | None = None
    size_mb: float | None = None
    peak_memory_mb: float | None = None
    macs: Count | None = None
    params: Count | None = None
    minimize: tuple[Objective, ...] = ()
    trials: Annotated[int, Range(-MOST, MOST)] = 40
    finalists: Annotated[int, Range(-MOST, MOST)] = 5
    short: float = 0.25
    hours: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "budget: ")
        for name in BOUNDS:
            value = getattr(self, name)
            low = 0 if name == "metric_drop" else math.ulp(0.0)
            if value is not None and not (isinstance(value, (int, float)) and low <= value < math.inf):
                wanted = "a finite number of at least 0" if name == "metric_drop" else "a finite number above 0"
                raise RecipeError(f"budget: {name} must be {wanted}, got {value!r}")
        for each in self.minimize:
            if each not in UNITS:
                raise RecipeError(f"budget: minimize knows {', '.join(UNITS)}; got {each!r}")
        if len(set(self.minimize)) < len(self.minimize):
            raise RecipeError(f"budget: minimize names one thing twice: {', '.join(self.minimize)}")
        for name in ("trials", "finalists"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise RecipeError(f"budget: {name} must be a whole number of at least 1, got {count!r}")
        if not 0 < self.short <= 1:
            raise RecipeError(f"budget: short must be in (0, 1], the share of a training, got {self.short!r}")
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise RecipeError(f"budget: hours must be a finite number above 0, got {self.hours!r}")

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are given, by what they bound, in the units of `UNITS`."""
        return {BOUNDS[name]: value for name in BOUNDS if (value := getattr(self, name)) is not None}

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is made small, in order."""
        if self.minimize:
            return self.minimize
        others = [bound for bound in self.bounds if bound != "metric_drop"] or ["latency"]
        return ("metric_drop", *others)  # type: ignore[arg-type]

    @property
    def figures(self) -> tuple[str, ...]:
        """All that must be measured of each candidate."""
        return tuple(dict.fromkeys((*self.objectives, *self.bounds)))

    def excess(self, figures: Mapping[str, float]) -> dict[str, float]:
        """By how much of each bound the figures are over it; 0 or less where it is kept.

        A bound of 0 is exceeded by the figure itself.
        """
        return {name: (figures[name] - bound) / (bound or 1.0) for name, bound in self.bounds.items()}


assert {field_.name for field_ in fields(Budget)} > set(BOUNDS)
