"""Fits the times of modules to measured programs: non-negative sums of their work, for each way of computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from torchslim.analysis.costs.layout import Layout
from torchslim.analysis.costs.moves import Moves, fit_moves
from torchslim.analysis.costs.samples import Sample
from torchslim.analysis.costs.sizes import Product, Sum, Work, merged, scaled, total
from torchslim.quantize.schemes import FLOAT

Floats = NDArray[np.float64]

FLOOR = 0.1
"""Share of a module's mean time below which its samples say nothing about the spread."""

APART = 3
"""Sets of units whose MACs are fitted apart, at most."""

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
        moves: the times of the kernels that pass values on between modules.
        constant: time of a call that no module takes.
    """

    own: Mapping[tuple[str, str], Curve] = field(default_factory=dict)
    moves: Moves = field(default_factory=Moves)
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
    alike: dict[tuple[str, int], list[str]] = {}
    parts = {path: _parts(work) for path, work in works.items()}
    for path, work in works.items():
        alike.setdefault((work.alike, len(parts[path])), []).append(path)
    for paths in alike.values():
        places = [(path, number) for path in paths for number in range(len(samples))]
        features = np.array([[1.0, *(_left(part, kept[number]) for part in parts[path])] for path, number in places])
        times = np.array([samples[number].own.get(path, 0.0) for path, number in places])
        weights = 1.0 / np.array([samples[number].ratio for _, number in places])
        contexts = np.array([layout.context(path, samples[number].choice.schemes) for path, number in places])
        for context, amounts in _by_context(features * weights[:, None], times * weights, contexts).items():
            rows = contexts == context
            low, high = _spread(times[rows], features[rows] @ amounts)
            for path in paths:
                own[path, context] = Curve(time=_sum(parts[path], amounts), low=low, high=high)
    return Fit(own=own, moves=fit_moves(samples, works, layout, kept))


def _by_context(table: Floats, target: Floats, contexts: NDArray[np.str_]) -> dict[str, Floats]:
    """Non-negative amounts of the features for each way of computing, by least squares.

    Some ways are one in truth, as where a runtime has no kernel for a scheme and computes on floats. A way with fewer
    samples takes the amounts of one with more if these predict its samples better than a fit predicts left-out ones.

    Args:
        table: (rows, features).
        target: (rows,).
        contexts: (rows,), the way of computing.
    """
    counts = {str(context): int((contexts == context).sum()) for context in np.unique(contexts)}
    amounts: dict[str, Floats] = {}
    for context in sorted(counts, key=lambda context: (-counts[context], context)):
        rows = contexts == context
        own_table, own_target = table[rows], target[rows]
        found = {other: float(((own_table @ amounts[other] - own_target) ** 2).sum()) for other in amounts}
        nearest = min(found, key=found.__getitem__, default=context)
        if found and found[nearest] < _left_out(own_table, own_target):
            amounts[context] = amounts[nearest]
        else:
            amounts[context] = np.asarray(nnls(own_table, own_target)[0])
    return amounts


def _left_out(table: Floats, target: Floats) -> float:
    """Sum of squares of the errors at rows that are left out of the fit in turn."""
    rows = np.arange(len(target))
    return float(
        sum((table[row] @ nnls(table[rows != row], target[rows != row])[0] - target[row]) ** 2 for row in rows)
        if len(rows) > 1
        else np.inf
    )


def _spread(times: Floats, fitted: Floats) -> tuple[float, float]:
    """10th and 90th percentile of times over fitted ones, without times that are nearly zero."""
    real = (times > FLOOR * times.mean()) & (fitted > 0)
    if not real.any():
        return 1.0, 1.0
    low, high = np.quantile(times[real] / fitted[real], (0.1, 0.9))
    return float(low), float(high)


def _parts(work: Work) -> list[Sum]:
    """The sums that a module's time is fitted by: its MACs, and the weights and activations that it reads and writes.

    MACs on different units, as those of the inputs and of the states of a recurrent layer, are fitted apart if they are
    few: kernels compute some of them in one product and others in many small ones.
    """
    by_units: dict[frozenset[int], list[Product]] = {}
    for product in work.macs:
        by_units.setdefault(product.units, []).append(product)
    macs = [tuple(products) for products in by_units.values()] if len(by_units) <= APART else [work.macs]
    return [part for part in (*macs, work.weights, work.reads, work.elements) if part]


def _left(part: Sum, kept: Mapping[int, float]) -> float:
    """Fraction of a sum that is left."""
    return float(total(part, kept) / total(part, {}))


def _sum(parts: Sequence[Sum], amounts: Floats) -> Sum:
    """The time as a sum of products: a constant, and the amounts of the parts."""
    constant, *others = amounts.tolist()
    products = [Product(amount=constant)]
    for part, amount in zip(parts, others, strict=True):
        full = total(part, {})
        products += [Product(amount=amount * term.amount / full, dims=term.dims) for term in part]
    return tuple(product for product in merged(products) if product.amount)


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
    for station in layout.readers:
        time = float(total(fitted.moves.time(station, layout.passes(station, schemes)), kept))
        parts[MOVES] = parts.get(MOVES, 0.0) + time
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
        moves=replace(fitted.moves, amounts=tuple(factors.get(MOVES, 1.0) * amount for amount in fitted.moves.amounts)),
        constant=float(amounts[-1]),
    )
