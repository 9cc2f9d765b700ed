"""Sizes of a model's operations as functions of the widths of its units: MACs, weights and activations by module.

Every unit narrows evenly, so the size of a dimension is affine in the kept fractions of the units that it holds, and an
amount of work is a sum of products of such dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchslim.prune.dependency.coupling import Coupling
from torchslim.prune.dependency.propagation import Layers
from torchslim.prune.dependency.trace import Value
from torchslim.prune.structured.selection import Selection

Shares = tuple[tuple[int, float], ...]
"""For each unit that a dimension holds, the share of the dimension that goes with the whole unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """`amount` times the product over `dims` of 1 - sum(share * (1 - kept fraction of the unit))."""

    amount: float
    dims: tuple[Shares, ...] = ()

    @property
    def units(self) -> frozenset[int]:
        """Units that it depends on."""
        return frozenset(unit for dim in self.dims for unit, _ in dim)

    def at(self, kept: Mapping[int, Any]) -> Any:
        """The value for kept fractions by unit, numbers or arrays that broadcast; units that are left out stay full."""
        factors = (1.0 - sum(share * (1.0 - kept[unit]) for unit, share in dim if unit in kept) for dim in self.dims)
        return self.amount * prod(factors)


Sum = tuple[Product, ...]
"""A sum of products."""


def total(amount: Sum, kept: Mapping[int, Any]) -> Any:
    """The sum for kept fractions by unit."""
    return sum((product.at(kept) for product in amount), start=0.0)


def merged(products: Iterable[Product]) -> Sum:
    """The sum with equal products taken together."""
    amounts: dict[tuple[Shares, ...], float] = {}
    for product in products:
        dims = tuple(sorted(dim for dim in product.dims if dim))
        amounts[dims] = amounts.get(dims, 0.0) + product.amount
    return tuple(Product(amount=amount, dims=dims) for dims, amount in amounts.items())


def scaled(amount: Sum, factor: float) -> Sum:
    """The sum times a factor."""
    return tuple(Product(amount=product.amount * factor, dims=product.dims) for product in amount)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Work of one module's own operations: MACs, elements of weights and activations read, and of those written."""

    macs: Sum = ()
    weights: Sum = ()
    reads: Sum = ()
    elements: Sum = ()
    output: Sum = ()  # elements of the last activation that it writes
    alike: str = ""  # equal for modules that do the same operations at the same sizes
    kind: str = ""  # equal for modules that do the same operations at any sizes

    @property
    def units(self) -> frozenset[int]:
        """Units that the work depends on."""
        parts = (*self.macs, *self.weights, *self.reads, *self.elements)
        return frozenset(unit for product in parts for unit in product.units)


@dataclass
class Sizes:
    """Sizes under any widths of the units of a selection."""

    selection: Selection
    _owner: NDArray[np.int64] = field(init=False)
    _masks: dict[int, NDArray[np.bool_]] = field(default_factory=dict)
    _known: dict[tuple[int, int], Shares] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._owner = np.full(self.coupling.atoms.count, -1, dtype=np.int64)
        for number, unit in enumerate(self.coupling.units):
            for cell in unit.cells:
                self._owner[cell.classes] = number

    @property
    def coupling(self) -> Coupling:
        """The coupled groups."""
        return self.selection.coupling

    def works(self) -> dict[str, Work]:
        """The work of each module that runs operations of its own, by path, in the order of execution."""
        owners = {id(core): name for name, value in self.coupling.trace.weights.items() for core in value.layers}
        stored = set(owners)  # of weights, and of what operations make of weights alone, such as transposed ones
        parts: dict[str, dict[str, list[Any]]] = {}
        for operation in self.coupling.trace.operations:
            if operation.constant:
                continue
            part = parts.setdefault(
                operation.path,
                {"macs": [], "weights": [], "reads": [], "elements": [], "seen": [], "key": [], "kind": []},
            )
            part["key"].append((operation.name, operation.scalars, [v.shape for v in operation.inputs]))
            part["kind"].append((operation.name, operation.inputs[1].shape[2:] if operation.macs else ()))
            if operation.macs:
                dims = tuple(self._shares(layers, dim) for layers, dim in operation.factors)
                part["macs"].append(Product(amount=float(operation.macs), dims=_flat(dims)))
            for value in operation.inputs:
                names = {owners.get(id(core)) for core in value.layers} - {None}
                if names and not names & set(part["seen"]):
                    part["seen"] += names
                    part["weights"].append(self._elements(value.layers, value.shape))
            if operation.inputs and all(_of(value, stored) for value in operation.inputs):
                stored |= {id(core) for value in operation.outputs for core in value.layers}
                continue
            part["reads"] += [self._elements(v.layers, v.shape) for v in operation.inputs if not _of(v, stored)]
            written = [self._elements(value.layers, value.shape) for value in operation.outputs]
            part["elements"] += written
            part["output"] = written[:1] or part.get("output", [])
        return {
            path: Work(
                macs=merged(part["macs"]),
                weights=merged(part["weights"]),
                reads=merged(part["reads"]),
                elements=merged(part["elements"]),
                output=merged(part.get("output", [])),
                kind=repr(sorted(set(part["kind"]))),
                alike=repr((part["key"], [self.coupling.units[unit].width for unit in self._units_of(part)])),
            )
            for path, part in parts.items()
        }

    def parameters(self) -> Sum:
        """Elements of all parameters, shared ones counted once."""
        weights = self.coupling.trace.weights
        return merged(self._elements(weights[name].layers, weights[name].shape) for name in self.selection.names)

    def weights(self) -> dict[str, Sum]:
        """Elements of each parameter, by name."""
        weights = self.coupling.trace.weights
        return {
            name: merged([self._elements(weights[name].layers, weights[name].shape)]) for name in self.selection.names
        }

    def macs(self) -> Sum:
        """MACs of a call on the example inputs."""
        return merged(product for work in self.works().values() for product in work.macs)

    def _units_of(self, part: Mapping[str, list[Any]]) -> list[int]:
        products = (*part["macs"], *part["weights"], *part["reads"], *part["elements"])
        return sorted({unit for product in products for unit in product.units})

    def _elements(self, layers: Layers, shape: Sequence[int]) -> Product:
        dims = tuple(self._shares(layers, dim) for dim in range(len(shape)))
        return Product(amount=float(prod(shape)), dims=_flat(dims))

    def _shares(self, layers: Layers, dim: int) -> tuple[Shares, ...]:
        """For each layer that thins out a dimension, the shares of the units in it."""
        return tuple(
            shares
            for core, classes in zip(layers, self.coupling.classes(layers), strict=True)
            if dim < classes.ndim and classes.shape[dim] > 1 and (shares := self._of(id(core), classes, dim))
        )

    def _of(self, core: int, classes: NDArray[np.int64], dim: int) -> Shares:
        if (core, dim) not in self._known:
            shares = []
            for unit in np.unique(self._owner[classes]).tolist():
                if unit >= 0:
                    others = tuple(index for index in range(classes.ndim) if index != dim)
                    stays = ~self._halved(unit)[classes]
                    gone = 1.0 - float((stays.any(axis=others) if others else stays).mean())
                    width = self.coupling.units[unit].width
                    if gone:
                        shares.append((unit, gone / (1.0 - max(width // 2, 1) / width)))
            self._known[core, dim] = tuple(shares)
        return self._known[core, dim]

    def _halved(self, unit: int) -> NDArray[np.bool_]:
        """Mask of the atoms that go if one unit keeps half of its steps."""
        if unit not in self._masks:
            kept = [unit.width for unit in self.coupling.units]
            kept[unit] = max(kept[unit] // 2, 1)
            self._masks[unit] = self.selection.removed(kept)
        return self._masks[unit]


def _of(value: Value, cores: Collection[int]) -> bool:
    """Whether a value is made of the stored tensors that have these cores."""
    return bool(value.layers) and all(id(core) in cores for core in value.layers)


def _flat(dims: Sequence[tuple[Shares, ...]]) -> tuple[Shares, ...]:
    return tuple(shares for of_layers in dims for shares in of_layers)
