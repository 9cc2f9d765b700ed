"""Free sizes of a captured program: the batch, found by running the model, or those of the user's `dynamic_shapes`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from torchslim.errors import ExportError
from torchslim.graph.buckets import listed_buckets
from torchslim.graph.calling import Flat, positional
from torchslim.graph.io_structure import Structure, leaf_names
from torchslim.graph.size_places import place_of_size

WORDS = ("auto", "batch", "fixed")
CERTAIN = 1e-3  # samples that differ by less are the same; above it, a later axis may fit better


def fixed_sizes(value: Tensor) -> list[int | None]:
    """Return the sizes of a program's value; None for a free size."""
    return [int(size) if isinstance(size, int) or str(size).isdigit() else None for size in value.shape]


def normalized(dynamic_shapes: Any) -> Any:
    """Return the argument with None for "fixed", and the dimensions of buckets, after a check of its words.

    Raises:
        ExportError: an unknown word, or a list of dimensions that are no whole numbers.
    """
    if isinstance(dynamic_shapes, str) and dynamic_shapes not in WORDS:
        raise ExportError(
            f"dynamic_shapes must be 'auto', 'batch', 'fixed', None, lists of dimensions by input, or a torch.export "
            f"spec, got {dynamic_shapes!r}"
        )
    if (buckets := listed_buckets(dynamic_shapes)) is not None:
        return {name: list(dims) for name, dims in buckets.items()}
    return None if isinstance(dynamic_shapes, str) and dynamic_shapes == "fixed" else dynamic_shapes


def lists_dimensions(dynamic_shapes: Any) -> bool:
    """Return whether the argument lists the free dimensions of inputs, such as `{"input_ids": [0, 1]}`."""
    return isinstance(dynamic_shapes, Mapping) and all(
        isinstance(dims, (list, tuple)) and dims and all(type(dim) is int for dim in dims)
        for dims in dynamic_shapes.values()
    )


def free_as_listed(
    inputs: Structure, leaves: Sequence[Tensor], dims: Mapping[str, Sequence[int]], batch: Sequence[Any] | None
) -> list[dict[int, Any] | None]:
    """Return the free sizes: those of the batch, and the listed dimensions of every tensor of an input.

    Raises:
        ExportError: an input that does not exist, or a dimension that none of its tensors has.
    """
    known = inputs["dict"]
    if unknown := sorted(set(dims) - set(known)):
        raise ExportError(f"dynamic_shapes names the inputs {', '.join(unknown)}; the model takes {', '.join(known)}")
    owners = [name for name, structure in known.items() for _ in leaf_names(structure)]
    spec: list[dict[int, Any] | None] = []
    for owner, leaf, sizes in zip(owners, leaves, batch or [None] * len(leaves), strict=True):
        free = dict(sizes or {})
        for dim in dims.get(owner, ()):
            if -leaf.dim() <= dim < leaf.dim():
                free.setdefault(dim % leaf.dim(), Dim.AUTO)
        spec.append(free or None)
    for name, listed in dims.items():
        most = max((leaf.dim() for owner, leaf in zip(owners, leaves, strict=True) if owner == name), default=0)
        if any(not -most <= dim < most for dim in listed):
            raise ExportError(f"dynamic_shapes lists dimensions {list(listed)} of input {name!r}, which has {most}")
    return spec


def find_batch_axis(
    flat: Flat, leaves: Sequence[Tensor]
) -> tuple[int | None, list[Tensor], list[dict[int, Any] | None] | None]:
    """Return the axis along which samples are independent, two of the example's samples, and the free sizes.

    For axis 0 and then 1, and each size that an input has there, the model runs on three samples and on two of them
    in another order: where the outputs are the same samples in that order, the axis is the batch. Where no outputs are
    the same but some are close, as those of integers or of a causal sequence are, the closest axis is the batch.
    Without a batch axis the result is None, the unchanged example, None.
    """
    order = torch.tensor([2, 0])
    best: tuple[float, tuple[int, list[Tensor], list[dict[int, Any] | None]]] | None = None
    for axis in (0, 1):
        for size in dict.fromkeys(leaf.shape[axis] for leaf in leaves if leaf.dim() > axis):
            batched = [leaf.dim() > axis and leaf.shape[axis] == size for leaf in leaves]
            three = [_samples(leaf, axis, 3) if varies else leaf for leaf, varies in zip(leaves, batched, strict=True)]
            two = [_pick(leaf, axis, order) if varies else leaf for leaf, varies in zip(three, batched, strict=True)]
            try:
                full, part = flat(*three), flat(*two)
            except Exception:  # noqa: BLE001 - any error means that this axis cannot vary
                continue
            if len(full) != len(part) or all(a.shape == b.shape for a, b in zip(full, part, strict=True)):
                continue
            distance = max(_apart(*pair, order) for pair in zip(full, part, strict=True))
            if distance <= 1 and (best is None or distance < best[0]):
                example = [
                    pick_samples(leaf, axis, 2) if varies else leaf
                    for leaf, varies in zip(leaves, batched, strict=True)
                ]
                best = distance, (axis, example, [{axis: Dim.DYNAMIC} if varies else None for varies in batched])
                if distance <= CERTAIN:
                    return best[1]
    if best is not None:
        return best[1]
    return None, list(leaves), None


def free_where_examples_differ(
    examples: Sequence[Sequence[Tensor]], batch: Sequence[Mapping[int, Any] | None] | None
) -> list[dict[int, Any] | None]:
    """Return the free sizes: those of the batch, and every size that differs between the examples.

    Args:
        examples: flat inputs of one structure, of equal dtypes and numbers of dimensions.
        batch: the free sizes of the batch; None where it was not found.
    """
    spec: list[dict[int, Any] | None] = []
    for leaves, sizes in zip(zip(*examples, strict=True), batch or [None] * len(examples[0]), strict=True):
        free = dict(sizes or {})
        for dim in range(leaves[0].dim()):
            if len({leaf.shape[dim] for leaf in leaves}) > 1:
                free.setdefault(dim, Dim.AUTO)  # the model's code may fix it, or tie it to another size
        spec.append(free or None)
    return spec


def pinned_sizes(spec: Sequence[Any], program: ExportedProgram, names: Sequence[str]) -> list[str]:
    """Return notes on the sizes that were to be free but that the model's code fixes, with the line that does."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    notes = []
    for index, (name, sizes) in enumerate(zip(names, spec, strict=True)):
        shape = fixed_sizes(values[program.graph_signature.user_inputs[index]])
        for dim in sizes or ():
            if shape[dim] is not None:
                notes.append(
                    f"the model's code fixes dimension {dim} of input {name!r} at {shape[dim]}"
                    f"{place_of_size(program, index, dim)}"
                )
    return notes


def _user_spec(flat: Flat, spec: Any, bound: Mapping[str, Any]) -> list[Any]:
    """Convert a dynamic_shapes argument to one entry per tensor."""
    args, kwargs = positional(flat.model, bound)
    if hasattr(spec, "dynamic_shapes"):  # torch.export.ShapesCollection, AdditionalInputs
        spec = spec.dynamic_shapes(flat.model, args, kwargs)
    if isinstance(spec, (tuple, list)):
        spec = dict(zip(bound, spec, strict=False))
    if not isinstance(spec, Mapping) or not set(spec) <= set(bound):
        raise ExportError(
            f"dynamic_shapes must be 'batch', None, or a torch.export spec of the inputs {', '.join(bound)}; "
            f"got {spec!r}"
        )
    entries: list[Any] = []
    for name, structure in flat.inputs["dict"].items():
        _spread(structure, spec.get(name), entries, name)
    return entries


def _spread(structure: Structure, spec: Any, entries: list[Any], path: str) -> None:
    kind = next(iter(structure))
    if kind == "tensor":
        entries.append(spec)
        return
    if kind in ("const", "float"):
        return
    content = structure["fields"] if kind in ("named", "record") else structure[kind]
    inner = content if isinstance(content, dict) else dict(enumerate(content))
    if spec is not None and not isinstance(spec, (tuple, list, Mapping)):
        raise ExportError(f"dynamic_shapes of {path} must be nested as the input is, got {spec!r}")
    specs = spec if isinstance(spec, Mapping) else dict(zip(inner, spec or (), strict=False))
    for key, part in inner.items():
        _spread(part, specs.get(key), entries, f"{path}[{key!r}]")


def pick_samples(leaf: Tensor, axis: int, count: int) -> Tensor:
    """Return the first `count` samples, again from the first one where there are fewer."""
    return _pick(leaf, axis, torch.arange(count) % max(leaf.shape[axis], 1))


def sampled_as(
    example: Sequence[Tensor], leaves: Sequence[Tensor], axis: int | None, batched: Sequence[bool]
) -> list[Tensor]:
    """Return the leaves with as many samples as an example has, in the inputs that have the batch axis."""
    return [
        pick_samples(leaf, axis, like.shape[axis]) if axis is not None and has_batch else leaf
        for like, leaf, has_batch in zip(example, leaves, batched, strict=True)
    ]


def _samples(leaf: Tensor, axis: int, count: int) -> Tensor:
    """Take `count` samples along the axis; floats are scaled so that samples differ even if the example's do not."""
    samples = pick_samples(leaf, axis, count)
    if leaf.is_floating_point():
        view = [1] * leaf.dim()
        view[axis] = count
        samples = samples * (1 - 0.25 * torch.arange(count, device=leaf.device, dtype=leaf.dtype)).view(view)
    return samples


def _pick(leaf: Tensor, axis: int, order: Tensor) -> Tensor:
    return leaf.index_select(axis, order.to(leaf.device))


def _apart(full: Tensor, part: Tensor, order: Tensor) -> float:
    """Return the distance of `part` from the samples `order` of `full` along the best axis; above 1 they differ.

    The distance is 0 where the two shapes are equal, and infinite where no axis has the right sizes.
    """
    if full.shape == part.shape:
        return 0.0
    distance = math.inf
    for axis in range(full.dim()):
        expected = [*full.shape]
        expected[axis] = len(order)
        if full.shape[axis] == 3 and list(part.shape) == expected:
            double = full.double().nan_to_num()
            picked = double.index_select(axis, order.to(full.device))
            error = (picked - part.double().nan_to_num()).square().sum()
            # the variation between samples only: a bias is the same for all of them
            differences = (double - double.mean(axis, keepdim=True)).square().sum()
            # kernels differ with the batch size, and in a quantized model one rounding changes a value by a whole step
            distance = min(distance, float(error / (0.1 * differences + 1e-10 * picked.square().sum() + 1e-20)))
    return distance
