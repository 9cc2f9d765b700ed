"""Fits the times of modules to those of whole programs alone, for runtimes without a profiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from torchslim.analysis.costs.fit import Curve, Fit, fractions
from torchslim.analysis.costs.layout import Layout
from torchslim.analysis.costs.moves import Moves
from torchslim.analysis.costs.samples import Sample
from torchslim.analysis.costs.sizes import Product, Sum, Work, merged, scaled, total

PULL = 0.02
"""Pull of the amounts towards zero, relative to the sum of squares of the programs."""


def fit_whole(samples: Sequence[Sample], works: Mapping[str, Work], layout: Layout, widths: Sequence[int]) -> Fit:
    """Fit one time per MAC, weight and activation for each kind of module and way of computing, and for each change.

    Modules of a kind, such as all convolutions with kernels of 3 by 3, share their amounts, since whole programs do not
    tell them apart.

    Args:
        samples: measured programs; the shares of their modules are not read.
        works: work of each module.
        layout: what decides how modules compute.
        widths: full widths of the units.
    """
    columns: dict[tuple[str, ...], int] = {}
    rows: list[dict[int, float]] = []

    def add(row: dict[int, float], key: tuple[str, ...], value: float) -> None:
        place = columns.setdefault(key, len(columns))
        row[place] = row.get(place, 0.0) + value

    outputs = {station: works[station].output if station in works else () for station in layout.readers}
    for sample in samples:
        row: dict[int, float] = {}
        kept, schemes = fractions(sample, widths), sample.choice.schemes
        add(row, ("call",), 1.0)
        for path, work in works.items():
            for name, part in _parts(work).items():
                add(row, (work.kind, layout.context(path, schemes), name), float(total(part, kept)))
        for station, output in outputs.items():
            for (made, taken), count in layout.passes(station, schemes).items():
                if made == taken:
                    continue
                add(row, ("move", made, taken, "constant"), float(count))
                add(row, ("move", made, taken, "elements"), count * float(total(output, kept)))
        rows.append(row)
    weights = 1.0 / np.array([sample.ratio for sample in samples])
    table = np.array([[row.get(place, 0.0) for place in range(len(columns))] for row in rows]) * weights[:, None]
    scale = np.maximum(np.sqrt((table**2).sum(axis=0)), 1e-30)
    pull = np.sqrt(PULL * len(rows)) * np.eye(len(columns))
    target = np.concatenate([np.ones(len(rows)), np.zeros(len(columns))])
    amounts = nnls(np.concatenate([table / scale * np.sqrt(len(rows)), pull]), target)[0] / scale * np.sqrt(len(rows))
    found = {key: float(amounts[place]) for key, place in columns.items()}
    own = {}
    contexts = {(path, layout.context(path, sample.choice.schemes)) for sample in samples for path in works}
    for path, context in contexts:
        products = [
            product
            for name, part in _parts(works[path]).items()
            for product in scaled(part, found[works[path].kind, context, name])
        ]
        own[path, context] = Curve(time=tuple(product for product in merged(products) if product.amount))
    names = tuple(sorted({(key[1], key[2]) for key in columns if key[0] == "move"}))
    moved: list[float] = []
    for made, taken in names:
        moved += 2 * [found["move", made, taken, "constant"], found["move", made, taken, "elements"]]
    return Fit(own=own, moves=Moves(names=names, amounts=tuple(moved), outputs=outputs), constant=found["call",])


def _parts(work: Work) -> dict[str, Sum]:
    """The sums that the time of a module is a sum of."""
    parts = {"macs": work.macs, "weights": work.weights, "reads": work.reads, "elements": work.elements}
    return {"constant": (Product(amount=1.0),), **{name: part for name, part in parts.items() if part}}
