"""Bytes of the artifact and of a call's memory, by widths and schemes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from torchslim.allocation.problem import Term
from torchslim.analysis.costs.fit import fractions
from torchslim.analysis.costs.samples import Sample
from torchslim.analysis.costs.sizes import Sizes, Sum, Work, scaled, total
from torchslim.analysis.costs.tables import Space, scheme_terms, sum_terms
from torchslim.quantize.schemes import FLOAT, find_scheme

FLOAT_BYTES = 4.0


def element_bytes(scheme: str) -> float:
    """Bytes of one weight: those of its bits, and its share of the scale of its group."""
    if scheme == FLOAT:
        return FLOAT_BYTES
    found = find_scheme(scheme)
    return found.weight_bits / 8 + (FLOAT_BYTES / found.group_size if found.group_size else 0.0)


def weight_terms(space: Space, sizes: Sizes) -> tuple[Term, ...]:
    """Terms of the bytes of all parameters: matrices by their layer's scheme, everything else in float."""
    plain: dict[str, Sum] = {}
    terms: list[Term] = []
    for name, amount in sizes.weights().items():
        layer = _layer(name, space)
        if layer and len(sizes.coupling.trace.weights[name].shape) > 1:
            schemes = {scheme: scaled(amount, element_bytes(scheme)) for scheme in space.schemes[layer]}
            terms += scheme_terms(space, layer, schemes)
        else:
            plain[name] = scaled(amount, FLOAT_BYTES)
    return (*terms, *sum_terms(space, plain))


def size_terms(space: Space, sizes: Sizes, samples: Sequence[Sample]) -> tuple[Term, ...]:
    """Terms of the bytes on disk: those of the weights, and what the file format adds for each layer of a scheme.

    The additions are fitted to the sizes of the samples; without any, there are none.
    """
    terms = list(weight_terms(space, sizes))
    known = [sample for sample in samples if sample.size_bytes]
    if not known:
        return tuple(terms)
    widths = [unit.width for unit in space.coupling.units]
    names = sorted({scheme for own in space.schemes.values() for scheme in own[1:]})
    rows, rest = [], []
    for sample in known:
        kept, schemes = fractions(sample, widths), sample.choice.schemes
        weights = sum(_bytes(name, amount, schemes, kept, space, sizes) for name, amount in sizes.weights().items())
        rows.append([1.0, *(float(list(schemes.values()).count(name)) for name in names)])
        rest.append(sample.size_bytes - weights)
    constant, *added = nnls(np.array(rows), np.maximum(rest, 0.0))[0].tolist()
    terms.append(Term(decisions=(), values=np.array(constant)))
    extra = dict(zip(names, added, strict=True))
    for place, own in enumerate(space.schemes.values(), len(space.kept)):
        values = np.array([extra.get(scheme, 0.0) for scheme in own])
        if values.any():
            terms.append(Term(decisions=(place,), values=values))
    return tuple(terms)


def memory_terms(space: Space, sizes: Sizes, works: Mapping[str, Work]) -> tuple[Term, ...]:
    """Terms of the bytes of a call: all weights, and the activations of the module that writes most, in float.

    Runtimes reuse the memory of activations, so the largest module's decides, not the sum.
    """
    largest = max(works, key=lambda path: total(works[path].elements, {}), default=None)
    terms = weight_terms(space, sizes)
    if largest is None:
        return terms
    return (*terms, *sum_terms(space, {largest: scaled(works[largest].elements, FLOAT_BYTES)}))


def _bytes(
    name: str, amount: Sum, schemes: Mapping[str, str], kept: Mapping[int, float], space: Space, sizes: Sizes
) -> float:
    layer = _layer(name, space)
    matrix = bool(layer) and len(sizes.coupling.trace.weights[name].shape) > 1
    return float(total(amount, kept)) * element_bytes(schemes.get(layer, FLOAT) if matrix else FLOAT)


def _layer(name: str, space: Space) -> str:
    """Path of the layer with a scheme that a parameter belongs to; empty if there is none."""
    path = name.rpartition(".")[0]
    return path if path in space.schemes else ""
