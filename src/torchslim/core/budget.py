"""Budget of a search: bounds that a compressed model must keep, and objectives to minimize."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from torchslim.core.checks import Range, check_fields
from torchslim.errors import RecipeError

Objective = Literal["metric_drop", "latency", "size", "peak_memory", "macs", "params"]

BOUNDS: Mapping[str, str] = {  # the figure that each bound limits
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
"""An upper bound of a count, such as MACs or parameters."""

MOST = 10**6  # trials


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds and objectives of a search, and its length.

    Args:
        metric_drop: how much worse than the original the metric may be on val, in the metric's own unit: 0.5 is half a
            point of an accuracy in per cent.
        latency_ms: latency of one sample per call on the runtime, in milliseconds.
        size_mb: size of the files that ship, in megabytes (10**6 bytes).
        peak_memory_mb: how much loading and running the artifact may raise a process's memory, in megabytes.
        macs: multiply-accumulates of one sample.
        params: number of the model's parameters.
        minimize: the objectives; by default the metric's drop and every other bounded figure, or the latency if no
            other figure is bounded.
        trials: number of trials; those that a killed worker lost do not count.
        finalists: number of best trials that are trained in full and measured as artifacts; up to twice as many while
            none of them keeps the bounds. As many come on top from trials that train nothing and keep the bounds, if no
            other of these is better.
        short: fraction of its training that a trial gets before finalists are chosen.
        hours: time after which no further trial begins; None: no limit.
        method: "sample" draws the values of all ranges. "solve" measures tables of costs and damages once, chooses the
            width of each group, the scheme of each layer and the blocks to drop by a solver, trains a few of the
            solutions, and solves again with what these show; other ranges stay at their first choice or their middle.
        epochs: with "solve", most epochs of all trainings together; by default as many as `trials` short trainings and
            `finalists` full ones of the recipe take.
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
    method: Literal["solve", "sample"] = "sample"
    epochs: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, RecipeError, "budget: ")
        for name in BOUNDS:
            value = getattr(self, name)
            low = 0 if name == "metric_drop" else math.ulp(0.0)
            if value is not None and not (isinstance(value, (int, float)) and low <= value < math.inf):
                expected = "a finite number of at least 0" if name == "metric_drop" else "a finite number above 0"
                raise RecipeError(f"budget: {name} must be {expected}, got {value!r}")
        for objective in self.minimize:
            if objective not in UNITS:
                raise RecipeError(f"budget: minimize takes {', '.join(UNITS)}; got {objective!r}")
        if len(set(self.minimize)) < len(self.minimize):
            raise RecipeError(f"budget: minimize has an entry twice: {', '.join(self.minimize)}")
        for name in ("trials", "finalists"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise RecipeError(f"budget: {name} must be a whole number of at least 1, got {count!r}")
        if self.epochs is not None and not 0 <= self.epochs < math.inf:
            raise RecipeError(f"budget: epochs must be a finite number of at least 0, got {self.epochs!r}")
        if self.epochs is not None and self.method != "solve":
            raise RecipeError("budget: epochs belongs to method = 'solve'; set it, or limit the trials")
        if not 0 < self.short <= 1:
            raise RecipeError(f"budget: short must be in (0, 1], the share of a training, got {self.short!r}")
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise RecipeError(f"budget: hours must be a finite number above 0, got {self.hours!r}")

    @property
    def bounds(self) -> dict[str, float]:
        """Bounds that are set, by the figure that they limit, in the units of `UNITS`."""
        return {BOUNDS[name]: value for name in BOUNDS if (value := getattr(self, name)) is not None}

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Figures to minimize, in order."""
        if self.minimize:
            return self.minimize
        others = [bound for bound in self.bounds if bound != "metric_drop"] or ["latency"]
        return ("metric_drop", *others)  # type: ignore[arg-type]

    @property
    def figures(self) -> tuple[str, ...]:
        """Figures to measure for every trial: objectives and bounded figures."""
        return tuple(dict.fromkeys((*self.objectives, *self.bounds)))

    def excess(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Relative excess of each figure over its bound; 0 or less if the bound is kept.

        For a bound of 0 the excess is the figure itself.
        """
        return {name: (figures[name] - bound) / (bound or 1.0) for name, bound in self.bounds.items()}


assert {field_.name for field_ in fields(Budget)} > set(BOUNDS)
