"""Which sizes of a capture are free, and the examples that show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchslim.errors import ExportError, TorchslimError
from torchslim.graph.calling import Flat
from torchslim.graph.dynamic_sizes import (
    _user_spec,
    find_batch_axis,
    free_as_listed,
    free_where_examples_differ,
    lists_dimensions,
    sampled_as,
)
from torchslim.graph.io_structure import Structure, flatten, leaf_names


@dataclass(frozen=True, kw_only=True)
class FreeSizes:
    """Which sizes of a capture are free.

    Attributes:
        leaves: the flat inputs to capture with.
        axis: the batch dimension; None if it is fixed.
        batch: the free sizes of the batch alone, by input.
        spec: all free sizes, by input.
        variants: flat inputs of further examples.
        notes: remarks for the user.
    """

    leaves: list[Tensor]
    axis: int | None = None
    batch: list[Any] | None = None
    spec: list[Any] | None = None
    variants: Sequence[list[Tensor]] = ()
    notes: tuple[str, ...] = ()

    def sampled(self, leaves: list[Tensor]) -> list[Tensor]:
        """An example with as many samples as the program is captured with."""
        batched = [bool(free) for free in self.batch or [None] * len(leaves)]
        return sampled_as(self.leaves, leaves, self.axis, batched)


def other_sizes(first: Sequence[Tensor], others: Iterable[Sequence[Tensor]]) -> tuple[tuple[Tensor, ...], ...]:
    """Return the examples whose sizes differ from those of the first, one for each combination of sizes."""
    by_shapes = {tuple(leaf.shape for leaf in leaves): tuple(leaf.cpu() for leaf in leaves) for leaves in others}
    by_shapes.pop(tuple(leaf.shape for leaf in first), None)
    return tuple(by_shapes.values())


def free_sizes_of(
    flat: Flat, given: list[Tensor], dynamic_shapes: Any, bound: Mapping[str, Any], others: Sequence[Mapping[str, Any]]
) -> FreeSizes:
    """Find the free sizes, and the example to capture with: the largest one, if sizes differ."""
    if dynamic_shapes is None:
        return FreeSizes(leaves=given)
    listed = lists_dimensions(dynamic_shapes)
    if not listed and dynamic_shapes not in ("auto", "batch"):
        return FreeSizes(leaves=given, spec=_user_spec(flat, dynamic_shapes, bound))
    further = others if dynamic_shapes == "auto" else ()
    variants = [_variant(flat.inputs, given, number, other) for number, other in enumerate(further, 2)]
    largest = max((given, *variants), key=lambda leaves: sum(leaf.numel() for leaf in leaves))
    axis, leaves, batch = find_batch_axis(flat, largest)
    spec = batch
    if variants:
        spec = free_where_examples_differ([given, *variants], batch)
    elif listed:
        spec = free_as_listed(flat.inputs, leaves, dynamic_shapes, batch)
    note = "no batch dimension was found: the sizes are fixed at those of the example inputs"
    notes = () if any(spec or ()) else (note,)
    return FreeSizes(leaves=leaves, axis=axis, batch=batch, spec=spec, variants=variants, notes=notes)


def _variant(inputs: Structure, first: Sequence[Tensor], number: int, other: Mapping[str, Any]) -> list[Tensor]:
    """The flat tensors of a further example.

    Raises:
        ExportError: it has another structure, dtype or number of dimensions than the first.
    """
    try:
        leaves = flatten(inputs, dict(other), f"example {number}")
    except TorchslimError as error:
        raise ExportError(f"the examples differ in more than sizes: {error}") from error
    for name, one, two in zip(leaf_names(inputs), first, leaves, strict=True):
        if (one.dtype, one.dim()) != (two.dtype, two.dim()):
            raise ExportError(
                f"the examples differ in more than sizes: input {name!r} is {one.dtype} with {one.dim()} dimensions in "
                f"the first, {two.dtype} with {two.dim()} in example {number}; give examples of one kind"
            )
    return [leaf.detach().to(one.device, copy=True) for one, leaf in zip(first, leaves, strict=True)]
