"""Facts about model and task that a suggestion is derived from, and the lines that explain it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torchslim.core.budget import Budget
from torchslim.core.hardware import instruction_set, saturates
from torchslim.core.metrics import Metric
from torchslim.report.numbers import counted
from torchslim.tuning.pilot import SAMPLES, Pilot

Document = dict[str, Any]

LOSS = (
    1.0  # points of a percentage, or per cent of another metric, that a rounding may lose unless the budget says else
)
ELSEWHERE = 0.3  # share of the time from which time outside of the samples' work, or of the parts, is named

SHOWN: Mapping[str, str] = {
    "convolution": "convolutions",
    "depthwise": "depthwise convolutions",
    "linear": "linear layers",
    "attention": "products of activations",
    "recurrent": "recurrent layers",
}


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Composition of a model; shares are fractions of its MACs.

    Attributes:
        runs: by runtime and scheme, the share for which the runtime has integer kernels.
        removable: the fractions of the MACs and of the parameters that removable channels hold.
        smallest: the fractions that the fewest channels hold which a step can remove; empty if none can be removed.
        stays: why no channel can be removed; empty if some can.
        tables: the fraction of the parameters that tables of embeddings hold.
    """

    shares: Mapping[str, float]
    counts: Mapping[str, int]
    operations: frozenset[str]
    macs: int
    parameters: int
    size_mb: float
    runs: Mapping[str, Mapping[str, float]]
    removable: Mapping[str, float]
    smallest: Mapping[str, float]
    stays: str
    tables: float
    recalibrates: bool  # it has batch norms, whose statistics are computed again after pruning

    @property
    def main(self) -> str:
        """The family of layers with the largest share of the MACs."""
        families = {
            "convolution": self.shares["convolution"] + self.shares["depthwise"],
            "attention": self.shares["linear"] + self.shares["attention"],
            "recurrent": self.shares["recurrent"],
        }
        return max(families, key=lambda name: families[name])


def combined(mixes: Sequence[Mix]) -> Mix:
    """The composition of several parts of a model together."""
    if len(mixes) == 1:
        return mixes[0]
    macs, parameters = sum(mix.macs for mix in mixes), sum(mix.parameters for mix in mixes)
    first = mixes[0]

    def share(value: Callable[[Mix], float]) -> float:
        return sum(value(mix) * mix.macs for mix in mixes) / macs

    return Mix(
        shares={kind: share(lambda mix, kind=kind: mix.shares[kind]) for kind in first.shares},  # type: ignore[misc]
        counts=sum((Counter(mix.counts) for mix in mixes), Counter()),
        operations=frozenset().union(*(mix.operations for mix in mixes)),
        macs=macs,
        parameters=parameters,
        size_mb=sum(mix.size_mb for mix in mixes),
        runs={
            runtime: {
                scheme: share(lambda mix, at=(runtime, scheme): mix.runs[at[0]][at[1]])  # type: ignore[misc]
                for scheme in schemes
            }
            for runtime, schemes in first.runs.items()
        },
        removable={
            "macs": share(lambda mix: mix.removable["macs"]),
            "params": sum(mix.removable["params"] * mix.parameters for mix in mixes) / parameters,
        },
        smallest={
            "macs": min((mix.smallest["macs"] * mix.macs for mix in mixes if mix.smallest), default=0.0) / macs,
            "params": min((mix.smallest["params"] * mix.parameters for mix in mixes if mix.smallest), default=0.0)
            / parameters,
        },
        stays="" if any(not mix.stays for mix in mixes) else first.stays,
        tables=sum(mix.tables * mix.parameters for mix in mixes) / parameters,
        recalibrates=any(mix.recalibrates for mix in mixes),
    )


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """How the task can train a model: the table of a step, None if it cannot, and on what it trains, or why not."""

    table: Document | None
    epochs: int
    about: str


def about_model(mix: Mix, schooling: Schooling) -> str:
    parts = [
        f"{share:.0%} in {SHOWN[kind]} ({mix.counts[kind]})"
        for kind, share in sorted(mix.shares.items(), key=lambda pair: -pair[1])
        if share >= 0.005
    ]
    reach = f"channels that may go hold {mix.removable['macs']:.0%} of them" if not mix.stays else "no channels may go"
    return (
        f"Model: {counted(mix.parameters)} parameters ({mix.size_mb:.3g} MB), {counted(mix.macs)} MACs a sample, "
        f"{', '.join(parts)}; {reach}; {schooling.about}."
    )


def about_machine(mix: Mix, runtimes: Sequence[str]) -> str:
    how = "8-bit products take two steps and weights keep 7 bits" if saturates() else "8-bit products are one step"
    parts = []
    for name in runtimes:
        shares = {scheme: mix.runs[name][scheme] for scheme in ("int8", "int8-dynamic")}
        shown = " or ".join(f"{share:.0%} ({scheme})" for scheme, share in shares.items() if share >= 0.005)
        parts.append(f"{name} {shown or 'none'}")
    return f"Machine: {instruction_set()}, {how}; of these MACs, computes on integers: {', '.join(parts)}."


def therefore(told: Sequence[str], left: Sequence[str]) -> str:
    line = f"Therefore: {', then '.join(told)}"
    return f"{line}; left out: {'; '.join(left)}." if left else f"{line}."


def tried(run: Pilot, metric: Metric, budget: Budget, quantization: Document) -> str:
    """The line of a pilot: its figures, and what cannot be expected of the recipe because of them."""
    head = f"Tried: {run.scheme} on {run.runtime}, plainly rounded"
    if run.speedup is None or run.before is None or run.after is None or run.lost is None:
        return f"{head}: {run.failure}"
    fast, unit = run.speedup, f" {metric.unit}".rstrip()
    clauses = [
        f"{fast.value:.2f}x [{fast.p10:.2f}-{fast.p90:.2f}] the speed of float, {fast.verdict}",
        f"{metric.name} {run.before:.2f} -> {run.after:.2f}{unit} on about {SAMPLES} samples of val",
    ]
    if not run.faster:
        clauses.append("do not expect speed from 8 bits here")
    if run.outside is not None and run.outside >= ELSEWHERE:
        clauses.append(f"{run.outside:.0%} of the time is spent outside of the parts, where nothing gets faster")
    if run.overhead is not None and run.overhead >= ELSEWHERE:
        clauses.append(
            f"{run.overhead:.0%} of the time of one sample is overhead of the call and of its many operations, which "
            "8 bits do not shorten: larger batches and fewer layers do"
        )
    allowed = allowed_loss(budget, metric, run.before)
    if run.lost > allowed:
        clauses.append(f"rounding alone loses more than {allowed:.2g}{unit}: {_mended(quantization, allowed)}")
    return f"{head}: {'; '.join(clauses)}."


def allowed_loss(budget: Budget, metric: Metric, before: float) -> float:
    """The largest loss that needs no mention, in the metric's unit: the budget's, or else `LOSS`."""
    if budget.metric_drop is not None:
        return budget.metric_drop
    return LOSS if metric.unit == "%" else LOSS / 100 * abs(before)


def _mended(quantization: Document, allowed: float) -> str:
    """What may hold the metric better than plain rounding."""
    if quantization.get("mode") == "qat":
        first = "the recipe trains on the grid, which may regain it"
    elif "accuracy" in quantization:
        first = "the recipe tries GPTQ and corrected biases, too"
    else:
        first = "try accuracy = 'best'"
    return f"{first}; if not, layers = 'auto' with metric_drop = {allowed:.2g} leaves the most sensitive ones in float"


def written(budget: Budget) -> Document:
    """The `[budget]` table of a recipe: fields that differ from their defaults, all objectives, and the trials."""
    changed = {
        field_.name: value
        for field_ in fields(budget)
        if (value := getattr(budget, field_.name)) != field_.default and field_.name != "minimize"
    }
    return changed | {"minimize": list(budget.objectives)} | {"trials": budget.trials}


def words(of: str) -> str:
    return "MACs" if of == "macs" else "parameters"


def up(share: float) -> float:
    """`share`, rounded up to a multiple of 1/20."""
    return math.ceil(round(share * 20, 6)) / 20


def down(share: float) -> float:
    """`share`, rounded down to a multiple of 1/20."""
    return math.floor(share * 20) / 20
