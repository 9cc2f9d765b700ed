"""Elementwise operations with broadcasting: whose atoms are coupled, and which layers the result has.

A merge has four stages. For `x (4, 3) + bias (3)` with layers x [[1], [2], [3], [4]] and [[5, 6, 7]], bias [8, 9, 10]:

1. Align: broadcasting puts a dimension in front of the bias, so its layer is [[8, 9, 10]].
2. Pair folded layers: where a dimension stands for several things, find their counterparts (here none does).
3. Couple: [[5, 6, 7]] and [[8, 9, 10]] vary along the same dimension, so 5-8, 6-9 and 7-10 go together.
   The result has the layers [[1], [2], [3], [4]] and [[5, 6, 7]].
4. Freeze: a layer stays where an operand has a dimension of more than one element without atoms. The bias has size 1
   along dimension 0, so 1 to 4 stay free; a constant of shape (4, 1) would freeze them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchslim.prune.dependency.constraints import Constraints
from torchslim.prune.dependency.layers import Layers, Operand, align, repetition, varying

SHARED = -1
"""The operand of a layer that stands for its counterparts in several operands."""


@dataclass(frozen=True, slots=True)
class Part:
    """A layer of one operand of a merge."""

    operand: int
    dims: frozenset[int]  # along which the layer varies
    layer: Tensor


def merged(constraints: Constraints, operands: Sequence[Operand], rank: int) -> Layers:
    """Couple the atoms of the operands of an elementwise operation, and return the layers of its result."""
    if not any(layers for layers, _ in operands):
        return ()
    aligned = [align(operand, rank) for operand in operands]
    parts = [Part(number, varying(layer), layer) for number, (layers, _) in enumerate(aligned) for layer in layers]
    parts = _pair_folded(constraints, parts)
    parts = _couple_same_dims(constraints, parts)
    parts = _couple_overlapping_dims(constraints, parts)
    layers = tuple(part.layer for part in parts)
    _freeze_at_fixed_sizes(constraints, layers, aligned)
    return layers


def _pair_folded(constraints: Constraints, parts: Sequence[Part]) -> list[Part]:
    """The parts, after those were paired of which an operand has several along the same dimensions.

    Folding channels and positions into one dimension, as `weight.view(out, -1)` does, leaves a layer of each.
    """
    counts = Counter((part.operand, part.dims) for part in parts)
    folded = {dims for (_, dims), count in counts.items() if count > 1}
    result = [part for part in parts if part.dims not in folded]
    for dims in folded:
        result += _paired_by_repetition(constraints, [part for part in parts if part.dims == dims])
    return result


def _paired_by_repetition(constraints: Constraints, parts: list[Part]) -> list[Part]:
    """Couple parts along the same dimensions whose atoms repeat in the same way, and freeze those without counterpart.

    They are returned unchanged if no two operands have parts that repeat in the same way.
    """
    alike: dict[bytes, list[Part]] = {}
    for part in parts:
        alike.setdefault(repetition(part.layer), []).append(part)
    paired = {pattern for pattern, group in alike.items() if len({part.operand for part in group}) > 1}
    if not paired:
        return parts
    result = []
    for pattern, (first, *others) in alike.items():
        for other in others:
            constraints.atoms.union(first.layer.numpy(), other.layer.numpy())
        if pattern in paired:
            result.append(Part(SHARED, first.dims, first.layer))
        else:  # the other operands are of a fixed size along the thing that this part stands for
            constraints.freeze_at_fixed_size(first.layer)
    return result


def _couple_same_dims(constraints: Constraints, parts: Sequence[Part]) -> list[Part]:
    """Couple parts of different operands that vary along the same dimensions, and return one of each."""
    distinct: list[Part] = []
    for part in parts:
        twins = [twin for twin in distinct if twin.dims == part.dims and twin.operand != part.operand]
        for twin in twins:
            if twin.layer is not part.layer:
                constraints.atoms.union(twin.layer.numpy(), part.layer.numpy())
        if part.dims and not twins:
            distinct.append(part)
    return distinct


def _couple_overlapping_dims(constraints: Constraints, parts: Sequence[Part]) -> list[Part]:
    """Couple parts that share some dimensions alone in their projections onto these; return those not implied.

    A part that varies along the shared dimensions alone goes with whole slices of the other, which implies it.
    """
    implied = set()
    for place, part in enumerate(parts):
        for earlier_place, earlier in enumerate(parts[:place]):
            shared = part.dims & earlier.dims
            if part.operand == earlier.operand or part.dims == earlier.dims or not shared:
                continue
            constraints.atoms.union(
                constraints.onto(part.layer, shared).numpy(), constraints.onto(earlier.layer, shared).numpy()
            )
            if shared == part.dims:
                implied.add(place)
            elif shared == earlier.dims:
                implied.add(earlier_place)
    return [part for place, part in enumerate(parts) if place not in implied]


def _freeze_at_fixed_sizes(constraints: Constraints, layers: Layers, operands: Sequence[Operand]) -> None:
    """Freeze the result's layers along dimensions that an operand spans without atoms: their size is fixed."""
    for operand_layers, shape in operands:
        tagged: frozenset[int] = frozenset().union(*map(varying, operand_layers))
        fixed = frozenset(dim for dim, size in enumerate(shape) if size > 1) - tagged
        for layer in layers:
            if varying(layer) & fixed:
                constraints.freeze_at_fixed_size(constraints.onto(layer, varying(layer) & fixed))
