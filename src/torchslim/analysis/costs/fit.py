"""Fits the times of modules to measured programs: non-negative sums of their work, for each way of computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from torchslim.analysis.costs.layout import INPUT, Kind, Layout
from torchslim.analysis.costs.samples import Sample
from torchslim.analysis.costs.sizes import Product, Sum, Work, merged, scaled, total
from torchslim.quantize.schemes import FLOAT

Floats = NDArray[np.float64]

FLOOR = 0.1
"""Share of a module's mean time below which errors of its samples count as absolute ones."""


MOVES = "moves"
"""Name of the casts and changes of layout among the ways of computing."""

RIDGE = 0.1
"""Pull of the factors of whole programs towards 1, relative to the programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Time as a sum of products of sizes, and the spread of the samples around it, as factors."""

    time: Sum
    low: float = 1.0
    high: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Times of all modules over the reference program's.

    Attributes:
        own: by module and context, the time of its kernels.
        moves: by layer (or `INPUT`) and set of changes of grid behind it, the time of the kernels that pass its output
            on.
        constant: time of a call that no module takes.
    """

    own: Mapping[tuple[str, str], Curve] = field(default_factory=dict)
    moves: Mapping[tuple[str, frozenset[tuple[Kind, Kind]]], Curve] = field(default_factory=dict)
    constant: float = 0.0

    def curve(self, path: str, context: str) -> Curve:
        """The time of a module in a context; one without samples computes as in the nearest context that has some."""
        before, _, after = context.partition(" ")
        for name in (context, *(f"{side} {side}" for side in (before, after) if side), FLOAT):
            if (path, name) in self.own:
                return self.own[path, name]
        return next((curve for (owner, _), curve in self.own.items() if owner == path), Curve(time=()))


def fractions(sample: Sample, widths: Sequence[int]) -> dict[int, float]:
    """Kept fraction of every unit in a sample."""
    return {unit: kept / width for unit, (kept, width) in enumerate(zip(sample.choice.kept, widths, strict=True))}


def fit(samples: Sequence[Sample], works: Mapping[str, Work], layout: Layout, widths: Sequence[int]) -> Fit:
    """Fit times to samples.

    Args:
        samples: measured programs with the shares of their modules.
        works: work of each module.
        layout: what decides how modules compute.
        widths: full widths of the units.
    """
    kept = [fractions(sample, widths) for sample in samples]
    own: dict[tuple[str, str], Curve] = {}
    alike: dict[str, list[str]] = {}
    for path, work in works.items():
        alike.setdefault(work.alike, []).append(path)
    for paths in alike.values():
        rows: dict[str, list[tuple[str, int]]] = {}
        for path in paths:
            for number, sample in enumerate(samples):
                rows.setdefault(layout.context(path, sample.choice.schemes), []).append((path, number))
        for context, places in rows.items():
            features = np.array([_features(works[path], kept[number]) for path, number in places])
            times = np.array([samples[number].own.get(path, 0.0) for path, number in places])
            amounts, low, high = _solve(features, times)
            for path in paths:
                own[path, context] = Curve(time=_sum(works[path], amounts), low=low, high=high)
    return Fit(own=own, moves=_moves(samples, works, layout, kept))


def _solve(features: Floats, times: Floats) -> tuple[Floats, float, float]:
    """Non-negative amounts of the features, by least squares of relative errors, and the spread around them."""
    scale = 1.0 / (times + FLOOR * times.mean() + 1e-9)
    amounts = nnls(features * scale[:, None], times * scale)[0]
    fitted = features @ amounts
    real = (times > FLOOR * times.mean()) & (fitted > 0)
    if not real.any():
        return amounts, 1.0, 1.0
    low, high = np.quantile(times[real] / fitted[real], (0.1, 0.9))
    return amounts, float(low), float(high)


def _features(work: Work, kept: Mapping[int, float]) -> list[float]:
    """1 and the fractions of the module's MACs, weights and activations that are left."""
    return [1.0, *(_left(part, kept) for part in (work.macs, work.weights, work.elements))]


def _left(part: Sum, kept: Mapping[int, float]) -> float:
    full = total(part, {})
    return float(total(part, kept) / full) if full else 0.0


def _sum(work: Work, amounts: Floats) -> Sum:
    """The time as a sum of products: the amounts of `_features`."""
    constant, *others = amounts.tolist()
    products = [Product(amount=constant)]
    for part, amount in zip((work.macs, work.weights, work.elements), others, strict=True):
        full = total(part, {})
        products += [Product(amount=amount * term.amount / full, dims=term.dims) for term in part if full]
    return tuple(product for product in merged(products) if product.amount)


def _moves(
    samples: Sequence[Sample], works: Mapping[str, Work], layout: Layout, kept: Sequence[Mapping[int, float]]
) -> dict[tuple[str, frozenset[tuple[Kind, Kind]]], Curve]:
    """Times of casts and changes of layout: a constant and an amount for each element, by changes of grid."""
    sums: list[dict[str, float]] = []
    for sample in samples:
        by_layer: dict[str, float] = {}
        for path, time in sample.moves.items():
            layer = path if path in layout.readers else next(iter(layout.before.get(path, ())), INPUT)
            by_layer[layer] = by_layer.get(layer, 0.0) + time
        sums.append(by_layer)
    outputs = {path: works[path].output if path in works else () for path in layout.readers}
    rows: dict[frozenset[tuple[Kind, Kind]], list[tuple[list[float], float]]] = {}
    for number, sample in enumerate(samples):
        for path, output in outputs.items():
            borders = layout.borders(path, sample.choice.schemes)
            features = [1.0, float(total(output, kept[number]))]
            rows.setdefault(borders, []).append((features, sums[number].get(path, 0.0)))
    curves: dict[tuple[str, frozenset[tuple[Kind, Kind]]], Curve] = {}
    for borders, places in rows.items():
        table, times = np.array([row for row, _ in places]), np.array([time for _, time in places])
        largest = max(float(table[:, 1].max()), 1.0)
        constant, slope = nnls(table / np.array([1.0, largest]), times)[0]
        for path, output in outputs.items():
            products = [Product(amount=float(constant))]
            products += [Product(amount=float(slope) / largest * term.amount, dims=term.dims) for term in output]
            curves[path, borders] = Curve(time=merged(products))
    return curves


def predicted(
    fitted: Fit, sample: Sample, works: Mapping[str, Work], layout: Layout, widths: Sequence[int]
) -> dict[str, float]:
    """The predicted time of a sample's choice, split by how modules compute: what `corrected` scales."""
    kept, schemes = fractions(sample, widths), sample.choice.schemes
    parts: dict[str, float] = {}
    for path in works:
        context = layout.context(path, schemes)
        time = float(total(fitted.curve(path, context).time, kept))
        parts[context] = parts.get(context, 0.0) + time
    for path in layout.readers:
        curve = fitted.moves.get((path, layout.borders(path, schemes)))
        if curve is not None:
            parts[MOVES] = parts.get(MOVES, 0.0) + float(total(curve.time, kept))
    return parts


def corrected(
    fitted: Fit, samples: Sequence[Sample], works: Mapping[str, Work], layout: Layout, widths: Sequence[int]
) -> Fit:
    """The fit with a factor for each way of computing and a constant, so that whole programs are met best.

    Factors are pulled towards 1, as a ridge regression does, since few programs tell little about a rare scheme.
    """
    rows = [predicted(fitted, sample, works, layout, widths) for sample in samples]
    names = sorted({name for row in rows for name in row})
    ratios = np.array([sample.ratio for sample in samples])
    table = np.array([[*(row.get(name, 0.0) for name in names), 1.0] for row in rows]) / ratios[:, None]
    pull = RIDGE * np.sqrt(len(samples)) * np.eye(len(names), len(names) + 1)
    amounts = nnls(
        np.concatenate([table, pull]), np.concatenate([np.ones(len(rows)), np.full(len(names), pull.max())])
    )[0]
    factors = dict(zip(names, amounts.tolist(), strict=False))
    return Fit(
        own={
            (path, context): replace(curve, time=scaled(curve.time, factors.get(context, 1.0)))
            for (path, context), curve in fitted.own.items()
        },
        moves={
            key: replace(curve, time=scaled(curve.time, factors.get(MOVES, 1.0))) for key, curve in fitted.moves.items()
        },
        constant=float(amounts[-1]),
    )
