"""Rules for views, joins, splits and look-ups, which are applied to the layers themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from torchslim.core.reason import Reason
from torchslim.prune.dependency.propagation import Layers, compressed, varying
from torchslim.prune.dependency.rules.registry import Call, axis, rule
from torchslim.prune.dependency.union_find import KEPT


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", "view_copy")
def reshape(call: Call) -> Sequence[Layers]:
    """The same elements under another shape."""
    layers, shape = call.operand(call.args[0])
    if call.args[0].dtype != call.outputs[0].dtype:
        call.tagger.freeze(layers, "seen as another type")
        return ()
    size = tuple(call.outputs[0].shape)
    return (call.tagger.layout(layers, shape, lambda core: core.reshape(size)),)


@rule(
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "movedim",
    "diagonal",
    "unfold",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "flip",
    "roll",
    "rot90",
    "native_channel_shuffle",
    "swapaxes",
    "mT",
)
def layout(call: Call) -> Sequence[Layers]:
    """Apply the operation to the layers themselves."""
    layers, shape = call.operand(call.args[0])
    return (call.tagger.layout(layers, shape, lambda core: call.func(core, *call.args[1:], **call.kwargs)),)


@rule("as_strided", "as_strided_copy")
def restride(call: Call) -> Sequence[Layers]:
    """The same shape in another memory order; tags cannot follow other strides."""
    layers, shape = call.operand(call.args[0])
    if tuple(call.args[1]) != shape:
        call.tagger.freeze(layers, "addressed by strides")
        return ()
    return (layers,)


@rule("expand", "expand_copy", "repeat", "tile", "repeat_interleave")
def expand(call: Call) -> Sequence[Layers]:
    """Repeated elements share their atoms; dimensions expanded from size 1 adapt."""
    layers, shape = call.operand(call.args[0])
    if call.func._schema.name == "aten::repeat_interleave" and isinstance(call.arg(1, "repeats"), Tensor):
        call.tagger.freeze(layers, "repeated by data")
        return ()
    moved = call.tagger.layout(layers, shape, lambda core: call.func(core, *call.args[1:], **call.kwargs))
    if call.func._schema.name == "aten::expand":
        size = tuple(call.outputs[0].shape)
        before = (1,) * (len(size) - len(shape)) + tuple(shape)
        grown = [new if old == 1 else 1 for old, new in zip(before, size, strict=True)]
        moved += call.tagger.own(grown, elastic=True)
    return (moved,)


@rule("constant_pad_nd")
def constant_pad(call: Call) -> Sequence[Layers]:
    """Padding elements along a dimension always stay; across other dimensions they go with their neighbors."""
    layers, _ = call.operand(call.args[0])
    result = []
    for core in layers:
        widths = [width if core.shape[-1 - place // 2] > 1 else 0 for place, width in enumerate(call.args[1])]
        result.append(compressed(torch.constant_pad_nd(core, widths, KEPT)))
    return (call.tagger.note(tuple(core for core in result if varying(core))),)


@rule("cat", "concat")
def cat(call: Call) -> Sequence[Layers]:
    """Join the operands along a dimension."""
    values = [
        argument for argument in call.args[0] if argument.dim() != 1 or argument.numel()
    ]  # torch skips the empty ones
    operands = [call.operand(value) for value in values]
    if not operands:
        return ()
    return (call.tagger.join(operands, axis(call.arg(1, "dim", 0), len(operands[0][1]))),)


@rule("stack")
def stack(call: Call) -> Sequence[Layers]:
    """Join the operands along a new dimension."""
    operands = [call.operand(argument) for argument in call.args[0]]
    dim = axis(call.arg(1, "dim", 0), len(operands[0][1]) + 1)
    lifted = [
        (tuple(core.unsqueeze(dim) for core in layers), (*shape[:dim], 1, *shape[dim:])) for layers, shape in operands
    ]
    return (call.tagger.join(lifted, dim),)


def _piece(call: Call, layers: Layers, shape: Sequence[int], dim: int, start: int, length: int) -> Layers:
    return call.tagger.layout(layers, shape, lambda core: core.narrow(dim, start, length))


def _equal_parts(call: Call, layers: Layers, dim: int, length: int, end: int) -> None:
    for core in layers:
        if varying(core) == {dim}:
            call.tagger.balance(core.split(length, dim), core.narrow(dim, 0, end))
        elif dim in varying(core):
            first = core.movedim(dim, 0).flatten(1)[:, 0]
            call.tagger.balance(first.split(length), first[:end])


@rule(
    "split",
    "unsafe_split",
    "chunk",
    "unsafe_chunk",
    "split_with_sizes",
    "unsafe_split_with_sizes",
    "split_copy",
    "tensor_split",
)
def split(call: Call) -> Sequence[Layers]:
    """Pieces of equal size stay equal; pieces of different sizes may shrink independently."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.arg(2, "dim", 0), len(shape))
    lengths = [piece.shape[dim] for piece in call.outputs]
    if layers and len(set(lengths)) == 1 and len(lengths) > 1:
        by_sizes = "sizes" in call.func._schema.name  # the last piece of `split` may become shorter
        _equal_parts(call, layers, dim, lengths[0], shape[dim] - (0 if by_sizes else lengths[0]))
    starts = np.cumsum([0, *lengths[:-1]])
    return [_piece(call, layers, shape, dim, int(start), length) for start, length in zip(starts, lengths, strict=True)]


@rule("slice", "narrow")
def slice_(call: Call) -> Sequence[Layers]:
    """A part by position: an equal share of the dimension stays one; otherwise all elements before its end stay."""
    value = call.args[0]
    layers, shape = call.operand(value)
    dim = axis(call.arg(1, "dim", 0), len(shape))
    size, length = shape[dim], call.outputs[0].shape[dim]
    start, step = call.arg(2, "start", 0) or 0, call.arg(4, "step", 1)
    start = min(start + size if start < 0 else start, size)
    if length < size:
        end = size if step != 1 else start if start + length == size else start + length
        if step == 1 and length > 1 and size % length == 0 and start % length == 0:
            _equal_parts(call, layers, dim, length, end)
        else:
            for core in layers:
                if dim in varying(core):
                    fixed = call.tagger.onto(core, frozenset({dim})).narrow(dim, 0, end)
                    call.tagger.freeze([fixed], "cut at a given position")
    return (call.tagger.layout(layers, shape, lambda core: call.func(core, *call.args[1:], **call.kwargs)),)


@rule("select", "select_int")
def select(call: Call) -> Sequence[Layers]:
    """One element by position: it and all elements before it stay."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.args[1], len(shape))
    index = call.args[2] % shape[dim]
    for core in layers:
        if dim in varying(core):
            call.tagger.freeze(
                [call.tagger.onto(core, frozenset({dim})).narrow(dim, 0, index + 1)], "taken by position"
            )
    return (call.tagger.layout(layers, shape, lambda core: core.select(dim, index)),)


@rule("unbind", "unbind_copy")
def unbind(call: Call) -> Sequence[Layers]:
    """Every element of a dimension by itself: their number is fixed."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.arg(1, "dim", 0), len(shape))
    fixed = [call.tagger.onto(core, frozenset({dim})) for core in layers if dim in varying(core)]
    call.tagger.freeze(fixed, "taken by position")
    return [
        call.tagger.layout(layers, shape, partial(torch.select, dim=dim, index=index)) for index in range(shape[dim])
    ]


@rule(
    "index",
    "index_select",
    "gather",
    "take_along_dim",
    "_unsafe_index",
    "scatter",
    "scatter_add",
    "index_add",
    "index_put",
    "_index_put_impl",
    "index_copy",
    "index_fill",
    "masked_scatter",
)
def index(call: Call) -> Sequence[Layers]:
    """Elements by tables of positions: the indexed dimensions and the tables do not shrink."""
    name = call.func._schema.name.partition("::")[2].rstrip("_")
    layers, shape = call.operand(call.args[0])
    if name in ("index", "_unsafe_index"):
        tables = [table for table in call.args[1] if table is not None]
        dims, first_dim = [], 0
        for argument in call.args[1]:
            width = argument.dim() if argument is not None and argument.dtype in (torch.bool, torch.uint8) else 1
            dims += list(range(first_dim, first_dim + width)) if argument is not None else []
            first_dim += width
    elif name == "index_select":
        tables, dims = [call.args[2]], [axis(call.args[1], len(shape))]
    else:  # rare operations: everything stays
        call.tagger.freeze(
            (core for tensor in call.tensors() for core in call.layers_of(tensor)), "scattered by positions"
        )
        return (tuple(core for core in layers),)
    for table in tables:
        call.tagger.freeze(call.layers_of(table), "a table of positions")
    indexed = frozenset(dims)
    fixed = [call.tagger.onto(core, varying(core) & indexed) for core in layers if varying(core) & indexed]
    call.tagger.freeze(fixed, "indexed by position")
    return (call.tagger.layout(layers, shape, lambda core: call.func(core, *call.args[1:])),)


@rule("embedding")
def embedding(call: Call) -> Sequence[Layers]:
    """Rows by data: the rows stay, their columns may be removed."""
    layers, _ = call.operand(call.args[0])
    rows = [core for core in layers if 0 in varying(core)]
    call.tagger.freeze(rows, Reason.LOOKED_UP)
    call.tagger.freeze(call.layers_of(call.args[1]), "a table of positions")
    rank = call.outputs[0].dim()
    columns = [core for core in layers if varying(core) == {1}]
    return (tuple(core.reshape((1,) * (rank - 1) + (-1,)) for core in columns),)
