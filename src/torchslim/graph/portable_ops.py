"""Rewrites of operations that converters and quantizers do not support into operations that they do.

An `EmbeddingBag` becomes an embedding and a reduction; a convolution whose number of groups is a free size (each sample
has a kernel of its own) becomes a batch of matrix products. Both compute what PyTorch computes, for any batch size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn import functional

from torchslim.graph.decompose import splice

aten = torch.ops.aten
BAGS = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)
SUM, MEAN, MAX = range(3)
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def portable(program: ExportedProgram) -> ExportedProgram:
    """Return a copy of the program without such operations; a program that has none is returned as it is."""
    if not any(_is_bag(node) or _has_free_groups(node) for node in program.graph.nodes):
        return program
    program = program.run_decompositions({})  # a copy; nothing is decomposed
    open_bags(program.graph_module)
    open_convolutions(program.graph_module)
    return program


# ----------------------------------------------------------------------------------------------------------------------


def open_bags(model: GraphModule) -> None:
    """Rewrite each embedding bag of which only the result is used as an embedding and a reduction."""
    for node in [bag for bag in model.graph.nodes if _is_bag(bag)]:
        _open_bag(model, node)
    model.graph.eliminate_dead_code()
    model.recompile()


def _is_bag(node: Node) -> bool:
    """Whether `node` is an embedding bag of which only the result is read (its other outputs serve the gradient)."""
    return node.target in BAGS and all(user.args[1] == 0 or not user.users for user in node.users)


def _open_bag(model: GraphModule, node: Node) -> None:
    arguments = _arguments(node)
    mode, last, padding = (
        arguments.get("mode", SUM),
        arguments.get("include_last_offset", False),
        arguments.get("padding_idx"),
    )
    if padding is not None and padding < 0:
        padding += arguments["weight"].meta["val"].shape[0]
    rows = _equal_bags(arguments["indices"], arguments["offsets"])
    factors = arguments.get("per_sample_weights")
    inputs = [arguments["weight"], arguments["indices"] if rows is None else rows]
    if rows is None:
        inputs.append(arguments["offsets"])
    if factors is not None:
        inputs.append(factors)

    def compute(weight: Tensor, indices: Tensor, *others: Tensor) -> Tensor:
        scale = others[-1].reshape(indices.shape) if factors is not None else None
        vectors = functional.embedding(indices.long(), weight)
        counted = None if padding is None else indices != padding
        if rows is not None:
            return _reduced_rows(vectors, mode, scale, counted)
        return _reduced(vectors, others[0], mode, scale, counted, last=bool(last))

    for result in [user for user in node.users if user.args[1] == 0]:
        splice(model, result, compute, inputs, owner=node)


def _equal_bags(indices: Any, offsets: Any) -> Node | None:
    """Return the two-dimensional (bags, size) indices before they were flattened; None if there were none."""
    if not isinstance(indices, Node) or not isinstance(offsets, Node):
        return None
    if indices.target not in (aten.reshape.default, aten.view.default) or offsets.target is not aten.arange.start_step:
        return None
    source, (start, _, step) = indices.args[0], offsets.args[:3]
    value = source.meta.get("val") if isinstance(source, Node) else None
    if not isinstance(value, Tensor) or value.dim() != 2 or list(indices.args[1]) != [-1] or start != 0:  # type: ignore[arg-type]
        return None
    size = step.meta["val"] if isinstance(step, Node) else step
    return source if isinstance(source, Node) and str(size) == str(value.shape[1]) else None


def _reduced_rows(vectors: Tensor, mode: int, scale: Tensor | None, counted: Tensor | None) -> Tensor:
    """Reduce bags of one size: (bags, size, width) -> (bags, width); `counted` and `scale` are (bags, size)."""
    if scale is not None:
        vectors = vectors * scale.unsqueeze(-1)
    if counted is None:
        if vectors.shape[1] == 0:
            return vectors.sum(1)  # bags without a value are 0 in every mode
        return vectors.sum(1) if mode == SUM else vectors.mean(1) if mode == MEAN else vectors.amax(1)
    if mode == MAX:
        largest = torch.where(counted.unsqueeze(-1), vectors, -torch.inf).amax(1)
        return torch.where(counted.any(1, keepdim=True), largest, 0.0)
    total = torch.where(counted.unsqueeze(-1), vectors, 0.0).sum(1)
    return total if mode == SUM else total / counted.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


def _reduced(
    vectors: Tensor, offsets: Tensor, mode: int, scale: Tensor | None, counted: Tensor | None, *, last: bool
) -> Tensor:
    """Reduce bags beginning at `offsets`: (values, width), (bags,) -> (bags, width); with `last` the last is an end."""
    values, width = vectors.shape
    # an extra bag behind the others takes the values after the last end
    bags = offsets.shape[0] - 1 if last else offsets.shape[0]
    starts = torch.zeros(values + 1, dtype=torch.int64, device=vectors.device)
    starts = starts.scatter_add(0, offsets.long(), torch.ones_like(offsets, dtype=torch.int64))
    bag = starts.cumsum(0)[:values] - 1
    if scale is not None:
        vectors = vectors * scale.unsqueeze(-1)
    if counted is not None:
        vectors = torch.where(counted.unsqueeze(-1), vectors, -torch.inf if mode == MAX else 0.0)
    places = bag.unsqueeze(-1).expand(values, width)
    empty = torch.full(
        (bags + 1, width), -torch.inf if mode == MAX else 0.0, dtype=vectors.dtype, device=vectors.device
    )
    if mode == MAX:
        reduced = empty.scatter_reduce(0, places, vectors, "amax", include_self=True)[:bags]
    else:
        reduced = empty.scatter_add(0, places, vectors)[:bags]
    if mode == SUM:
        return reduced
    ones = torch.ones_like(bag) if counted is None else counted.long()
    sizes = torch.zeros(bags + 1, dtype=torch.int64, device=vectors.device).scatter_add(0, bag, ones)[:bags]
    if mode == MAX:
        return torch.where((sizes > 0).unsqueeze(-1), reduced, 0.0)
    return reduced / sizes.clamp(min=1).unsqueeze(-1).to(reduced.dtype)


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedConvolution:
    """The options of a convolution with `inputs` channels in a group, one number for each dimension of positions."""

    inputs: int
    stride: Sequence[int]
    padding: Sequence[int] | str
    dilation: Sequence[int]
    output_padding: Sequence[int]
    transposed: bool = False


def open_convolutions(model: GraphModule) -> None:
    """Rewrite convolutions whose number of groups is a free size as batches of matrix products."""
    for node in [convolution for convolution in model.graph.nodes if _has_free_groups(convolution)]:
        arguments = _arguments(node)
        tensors = [arguments[name] for name in ("input", "weight", "bias") if arguments.get(name) is not None]
        splice(model, node, partial(convolution_of_groups, _grouped_convolution(node)), tensors)
    model.graph.eliminate_dead_code()
    model.recompile()


def _grouped_convolution(node: Node) -> GroupedConvolution:
    arguments = _arguments(node)
    rank = arguments["weight"].meta["val"].dim() - 2
    inputs_of_a_group = _inputs_of_a_group(node)
    assert inputs_of_a_group is not None
    return GroupedConvolution(
        inputs=inputs_of_a_group,
        stride=_spread(arguments.get("stride", 1), rank),
        padding=_spread(arguments.get("padding", 0), rank),
        dilation=_spread(arguments.get("dilation", 1), rank),
        output_padding=_spread(arguments.get("output_padding", 0), rank),
        transposed=node.target in TRANSPOSED,
    )


def _arguments(node: Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _has_free_groups(node: Node) -> bool:
    if node.target not in (*CONVOLUTIONS, *TRANSPOSED) or not isinstance(_arguments(node).get("groups"), Node):
        return False
    return _inputs_of_a_group(node) is not None


def _inputs_of_a_group(node: Node) -> int | None:
    """Number of input channels in a group; None where it is not fixed."""
    arguments = _arguments(node)
    rank = arguments["weight"].meta["val"].dim() - 2
    share = str(arguments["input"].meta["val"].shape[-rank - 1] // arguments["groups"].meta["val"])
    return int(share) if share.isdigit() else None


def _spread(value: Any, rank: int) -> Any:
    """Return one number for each dimension of positions; text, such as "same", is returned as it is."""
    if isinstance(value, str):
        return value
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * rank if len(sizes) == 1 else sizes


def convolution_of_groups(options: GroupedConvolution, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a grouped convolution of any rank as one batch of matrix products.

    Shapes: (batch, groups * inputs, *positions), (groups * outputs, inputs, *kernel) and (groups * outputs,) give
    (batch, groups * outputs, *positions); a transposed convolution has the weight (groups * inputs, outputs, *kernel).
    The batch dimension may be missing.
    """
    kernel, inputs, stride = weight.shape[2:], options.inputs, options.stride
    rank = len(kernel)
    if x.dim() == rank + 1:
        return convolution_of_groups(options, x[None], weight, bias)[0]
    groups = x.shape[1] // inputs
    spans = [step * (size - 1) for step, size in zip(options.dilation, kernel, strict=True)]
    sides = _sides(options.padding, spans)
    outputs = weight.shape[1] if options.transposed else weight.shape[0] // groups
    if options.transposed:  # a convolution of the input, with zeros between its values, by the flipped kernel
        weight = weight.reshape(groups, inputs, outputs, *kernel).flip(tuple(range(3, 3 + rank))).transpose(1, 2)
        x = _spaced(x, stride)
        spans_and_sides = zip(spans, sides, options.output_padding, strict=True)
        sides = [(span - low, span - high + extra) for span, (low, high), extra in spans_and_sides]
        stride = [1] * rank
    else:
        weight = weight.reshape(groups, outputs, inputs, *kernel)
    x = functional.pad(x, [size for pair in reversed(sides) for size in pair])
    batch = x.shape[0]
    x = x.reshape(batch, groups, inputs, *x.shape[2:])
    positions = [(size - span - 1) // step + 1 for size, span, step in zip(x.shape[3:], spans, stride, strict=True)]
    columns = torch.stack(
        [
            _kernel_inputs(x, place, options.dilation, stride, positions)
            for place in itertools.product(*map(range, kernel))
        ],
        3,
    )
    columns = columns.reshape(batch, groups, inputs * math.prod(kernel), math.prod(positions))
    result = torch.matmul(weight.reshape(groups, outputs, inputs * math.prod(kernel)), columns)
    result = result.reshape(batch, groups * outputs, *positions)
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


def _sides(padding: Sequence[int] | str, spans: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after the values of each dimension, for a kernel that extends over `spans` further ones."""
    if not isinstance(padding, str):
        return [(side, side) for side in padding]
    return [(span // 2, span - span // 2) if padding == "same" else (0, 0) for span in spans]


def _kernel_inputs(
    x: Tensor, place: Sequence[int], dilation: Sequence[int], stride: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """Return the inputs that one number of the kernel multiplies: (batch, groups, inputs, *counts)."""
    for axis, (index, spacing, step, count) in enumerate(zip(place, dilation, stride, counts, strict=True), 3):
        start = index * spacing
        x = x[(slice(None),) * axis + (slice(start, start + (count - 1) * step + 1, step),)]
    return x


def _spaced(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Insert `stride` - 1 zeros between neighboring values of (batch, channels, *positions)."""
    for axis, step in enumerate(stride, 2):
        if step > 1:
            size = x.shape[axis]
            spaced = functional.pad(x.unsqueeze(axis + 1), [0, 0] * (x.dim() - axis - 1) + [0, step - 1])
            x = spaced.flatten(axis, axis + 1).narrow(axis, 0, (size - 1) * step + 1)
    return x
