"""Times of casts and changes of layout between modules, by how the values of each station are passed on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from torchslim.analysis.costs.layout import Layout, Pass
from torchslim.analysis.costs.samples import Sample
from torchslim.analysis.costs.sizes import Product, Sum, Work, merged, total

PULL = 1.0
"""Programs' worth of pull of a station's own times towards those of all stations that pass values on alike."""

Passes = frozenset[tuple[Pass, int]]
"""How values are passed on, with the number of readers of each kind."""


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Times of casts and changes of layout over the reference program's.

    Attributes:
        names: how values are passed on in the samples.
        amounts: for each name a constant and a time for each element of the station's output, first of one reader, then
            of each further one.
        factors: by station and how its values are passed on, how its own samples differ.
        outputs: elements of the output of each station.
    """

    names: tuple[Pass, ...] = ()
    amounts: tuple[float, ...] = ()
    factors: Mapping[tuple[str, Passes], float] = field(default_factory=dict)
    outputs: Mapping[str, Sum] = field(default_factory=dict)

    def time(self, station: str, passes: Counter[Pass]) -> Sum:
        """The time behind a station."""
        constants, slopes = np.reshape(self.amounts, (-1, 2)).T if self.amounts else np.zeros((2, 0))
        counts = _counts(passes, self.names)
        factor = self.factors.get((station, frozenset(passes.items())), 1.0)
        slope = factor * float(slopes @ counts)
        products = [Product(amount=factor * float(constants @ counts))]
        products += [Product(amount=slope * term.amount, dims=term.dims) for term in self.outputs.get(station, ())]
        return tuple(product for product in merged(products) if product.amount)


def fit_moves(
    samples: Sequence[Sample], works: Mapping[str, Work], layout: Layout, kept: Sequence[Mapping[int, float]]
) -> Moves:
    """Fit the times behind all stations together, then a factor for each station and way to pass its values on.

    Errors count relative to the programs' times.

    Args:
        samples: measured programs.
        works: work of each module.
        layout: the stations.
        kept: kept fraction of every unit in each sample.
    """
    outputs = {station: works[station].output if station in works else () for station in layout.readers}
    passes = [
        {station: layout.passes(station, sample.choice.schemes) for station in layout.readers} for sample in samples
    ]
    names = tuple(sorted({name for by_station in passes for counts in by_station.values() for name in counts}))
    rows, times, weights, keys = [], [], [], []
    for sample, by_station, fractions in zip(samples, passes, kept, strict=True):
        sums: Counter[str] = Counter()
        for path, time in sample.moves.items():
            sums[path if path in layout.readers else layout.station(path)] += time  # type: ignore[assignment]
        for station, counts in by_station.items():
            elements = float(total(outputs[station], fractions))
            rows.append(np.outer(_counts(counts, names), [1.0, elements]).ravel())
            times.append(float(sums[station]))
            weights.append(1.0 / sample.ratio)
            keys.append((station, frozenset(counts.items())))
    table, target, weight = np.array(rows), np.array(times), np.array(weights)
    scale = np.maximum(table.max(axis=0), 1e-9)
    amounts = nnls(table / scale * weight[:, None], target * weight)[0] / scale
    fitted = table @ amounts
    factors: dict[tuple[str, Passes], float] = {}
    for key in set(keys):
        own = np.array([place for place, other in enumerate(keys) if other == key])
        expected, found = fitted[own] * weight[own], target[own] * weight[own]
        pull = PULL * float(np.mean(expected**2))
        if pull > 0:
            factors[key] = float((expected @ found + pull) / (expected @ expected + pull))
    return Moves(names=names, amounts=tuple(amounts.tolist()), factors=factors, outputs=outputs)


def _counts(passes: Counter[Pass], names: Sequence[Pass]) -> list[float]:
    """For each name whether there is a reader of its kind, and the number of further ones."""
    return [count for name in names for count in (float(passes[name] > 0), float(max(passes[name] - 1, 0)))]
