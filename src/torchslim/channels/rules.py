"""What each operation does to tags. An operation without a rule freezes what goes into it; it is never an error.

Operations are seen as the dispatcher sees them, below `linear`, `einsum` or `scaled_dot_product_attention`, so that a
few dozen rules serve every model. Pointwise operations are known by their tag, views are applied to the layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torchslim.channels.tags import Layers, Operand, Tagger, varying


@dataclass(frozen=True)
class Call:
    """One operation at work: its arguments, what came out, and the tags of the tensors among them."""

    tagger: Tagger
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Any, ...]
    layers_of: Callable[[Any], Layers]

    def operand(self, value: Any) -> Operand:
        """A tensor's layers and shape; numbers have neither."""
        return (self.layers_of(value), tuple(value.shape)) if isinstance(value, Tensor) else ((), ())

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by place or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments."""
        return (leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor))


Rule = Callable[[Call], Sequence[Layers]]
"""Gives the layers of each output, in order; outputs that are left out have none."""

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by their names without overloads."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply(call: Call) -> tuple[Sequence[Layers], bool]:
    """The outputs' layers, and whether the operation has a rule."""
    namespace, _, name = call.func._schema.name.partition("::")
    found = RULES.get(name) if namespace in ("aten", "torchvision", "prims") else None
    if found is None and _is_pointwise(call.func):
        found = pointwise
    if found is None and name.endswith("_") and name[:-1] in RULES:
        found = RULES[name[:-1]]  # in place: the same tensor comes out
    if found is not None:
        return found(call), True
    call.tagger.freeze(
        (core for each in call.tensors() for core in call.layers_of(each)), f"operation {name!r} has no rule"
    )
    return (), False


@functools.cache
def _is_pointwise(func: Any) -> bool:
    packet = getattr(torch.ops, func.namespace)
    plain = getattr(packet, func._opname.removesuffix("_"), None)  # only the out-of-place form carries the tag
    overloads = [func, *(getattr(plain, name) for name in plain.overloads())] if plain is not None else [func]
    return any(torch.Tag.pointwise in each.tags for each in overloads)


def axis(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % max(rank, 1)


def axes(dims: Any, rank: int) -> list[int]:
    """Dimensions counted from the front; None and () are all of them."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [axis(dim, rank) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


# -- elementwise --------------------------------------------------------------------------------------------------------


@rule("masked_fill", "where", "addcmul", "addcdiv", "lerp", "_prelu_kernel", "copy", "dropout", "fill", "clamp",
      "hardswish", "hardsigmoid", "hardtanh", "mish", "leaky_relu", "elu", "celu", "gelu", "silu", "softplus",
      "log_sigmoid_forward", "relu6", "threshold", "_fake_quantize_per_tensor_affine", "rrelu_with_noise")  # fmt: skip
def pointwise(call: Call) -> Sequence[Layers]:
    """Broadcast and couple all operands."""
    operands = [call.operand(each) for each in call.tensors()]
    shape = np.broadcast_shapes(*(tuple(size) for _, size in operands)) if operands else ()
    return (call.tagger.merge(operands, shape),)


@rule("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "zero", "native_dropout",
      "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli", "uniform", "normal",
      "_softmax", "_log_softmax", "_safe_softmax", "softmax", "cumsum", "cumprod", "logcumsumexp", "random", "exponential",
      "resolve_conj", "resolve_neg", "_conj", "nan_to_num", "logit", "glu_jvp", "view_as_real_copy", "positive")  # fmt: skip
def same(call: Call) -> Sequence[Layers]:
    """The tags of the first operand, unchanged; a softmax runs over what is kept."""
    layers, _ = call.operand(call.args[0])
    return (layers,) * len(call.outputs)


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full",
      "empty_strided", "new_empty_strided", "scalar_tensor")  # fmt: skip
def created(call: Call) -> Sequence[Layers]:
    """Values without a meaning by position: their sizes adapt to whatever they meet."""
    return (call.tagger.own(call.outputs[0].shape, elastic=True),)


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "size", "sym_size")
def counted(call: Call) -> Sequence[Layers]:
    """Values that mean their position: of a fixed size."""
    return ()


@rule("tril", "triu")
def triangle(call: Call) -> Sequence[Layers]:
    """Positions of the last two dimensions matter."""
    layers, shape = call.operand(call.args[0])
    dims = {len(shape) - 2, len(shape) - 1}
    fixed = [call.tagger.onto(core, varying(core) & dims) for core in layers if varying(core) & dims]
    call.tagger.freeze(fixed, "positions matter to a triangle")
    return (layers,)


# -- layout -------------------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", "view_copy")
def reshape(call: Call) -> Sequence[Layers]:
    """The same elements under another shape."""
    layers, shape = call.operand(call.args[0])
    if call.args[0].dtype != call.outputs[0].dtype:
        call.tagger.freeze(layers, "seen as another type")
        return ()
    size = tuple(call.outputs[0].shape)
    return (call.tagger.layout(layers, shape, lambda core: core.reshape(size)),)


@rule("permute", "transpose", "t", "unsqueeze", "squeeze", "movedim", "diagonal", "unfold", "pixel_shuffle",
      "pixel_unshuffle", "channel_shuffle", "flip", "roll", "rot90", "native_channel_shuffle", "swapaxes", "mT")  # fmt: skip
def layout(call: Call) -> Sequence[Layers]:
    """Applied to the layers themselves."""
    layers, shape = call.operand(call.args[0])
    return (call.tagger.layout(layers, shape, lambda core: call.func(core, *call.args[1:], **call.kwargs)),)


@rule("as_strided", "as_strided_copy")
def restride(call: Call) -> Sequence[Layers]:
    """The same shape in another memory order; anything else is beyond tags."""
    layers, shape = call.operand(call.args[0])
    if tuple(call.args[1]) != shape:
        call.tagger.freeze(layers, "addressed by strides")
        return ()
    return (layers,)


@rule("expand", "expand_copy", "repeat", "tile", "repeat_interleave")
def expand(call: Call) -> Sequence[Layers]:
    """Repeated elements share their atoms; dimensions that grow from nothing adapt."""
    layers, shape = call.operand(call.args[0])
    if call.func._schema.name == "aten::repeat_interleave" and isinstance(call.arg(1, "repeats"), Tensor):
        call.tagger.freeze(layers, "repeated by data")
        return ()
    moved = call.tagger.layout(layers, shape, lambda core: call.func(core, *call.args[1:], **call.kwargs))
    if call.func._schema.name == "aten::expand":
        size = tuple(call.outputs[0].shape)
        before = (1,) * (len(size) - len(shape)) + shape
        grown = [new if old == 1 else 1 for old, new in zip(before, size, strict=True)]
        moved += call.tagger.own(grown, elastic=True)
    return (moved,)


@rule("constant_pad_nd")
def constant_pad(call: Call) -> Sequence[Layers]:
    """Padding elements along a dimension never go; across the others they come and go with their neighbours."""
    layers, shape = call.operand(call.args[0])
    pad = list(call.args[1])
    padded = {len(shape) - 1 - place // 2 for place, width in enumerate(pad) if width}
    inside = tuple(core for core in layers if varying(core) & padded)
    moved = call.tagger.layout(inside, shape, lambda core: torch.constant_pad_nd(core, pad, 0))
    return (tuple(core for core in layers if not varying(core) & padded) + moved,)


@rule("cat", "concat")
def cat(call: Call) -> Sequence[Layers]:
    """Joined along a dimension."""
    values = [each for each in call.args[0] if each.dim() != 1 or each.numel()]  # torch skips the empty ones
    operands = [call.operand(each) for each in values]
    if not operands:
        return ()
    return (call.tagger.join(operands, axis(call.arg(1, "dim", 0), len(operands[0][1]))),)


@rule("stack")
def stack(call: Call) -> Sequence[Layers]:
    """Joined along a new dimension."""
    operands = [call.operand(each) for each in call.args[0]]
    dim = axis(call.arg(1, "dim", 0), len(operands[0][1]) + 1)
    lifted = [
        (tuple(core.unsqueeze(dim) for core in layers), (*shape[:dim], 1, *shape[dim:])) for layers, shape in operands
    ]
    return (call.tagger.join(lifted, dim),)


def _piece(call: Call, layers: Layers, shape: Sequence[int], dim: int, start: int, length: int) -> Layers:
    return call.tagger.layout(layers, shape, lambda core: core.narrow(dim, start, length))


def _equal_parts(call: Call, layers: Layers, dim: int, length: int) -> None:
    for core in layers:
        if varying(core) == {dim}:
            call.tagger.balance(core.split(length, dim))
        elif dim in varying(core):
            call.tagger.balance(core.movedim(dim, 0).flatten(1)[:, 0].split(length))


@rule("split", "unsafe_split", "chunk", "unsafe_chunk", "split_with_sizes", "unsafe_split_with_sizes", "split_copy",
      "tensor_split")  # fmt: skip
def split(call: Call) -> Sequence[Layers]:
    """Pieces of one size stay of one size; pieces of given sizes may shrink each by itself."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.arg(2, "dim", 0), len(shape))
    lengths = [piece.shape[dim] for piece in call.outputs]
    if layers and len(set(lengths)) == 1 and len(lengths) > 1:
        _equal_parts(call, layers, dim, lengths[0])
    starts = np.cumsum([0, *lengths[:-1]])
    return [
        _piece(call, layers, shape, dim, int(start), length) for start, length in zip(starts, lengths, strict=True)
    ]


@rule("slice", "narrow")
def slice_(call: Call) -> Sequence[Layers]:
    """A part by position: an equal share of the dimension stays an equal share, else what is before its end stays."""
    value = call.args[0]
    layers, shape = call.operand(value)
    dim = axis(call.arg(1, "dim", 0), len(shape))
    size, length = shape[dim], call.outputs[0].shape[dim]
    start, step = call.arg(2, "start", 0) or 0, call.arg(4, "step", 1)
    start = min(start + size if start < 0 else start, size)
    if length < size:
        if step == 1 and length and size % length == 0 and start % length == 0:
            _equal_parts(call, layers, dim, length)
        else:
            end = size if step != 1 else start if start + length == size else start + length
            for core in layers:
                if dim in varying(core):
                    fixed = call.tagger.onto(core, frozenset({dim})).narrow(dim, 0, end)
                    call.tagger.freeze([fixed], "cut at a given position")
    return (call.tagger.layout(layers, shape, lambda core: call.func(core, *call.args[1:], **call.kwargs)),)


@rule("select", "select_int")
def select(call: Call) -> Sequence[Layers]:
    """One element by position: nothing before it may go."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.args[1], len(shape))
    index = call.args[2] % shape[dim]
    for core in layers:
        if dim in varying(core):
            call.tagger.freeze([call.tagger.onto(core, frozenset({dim})).narrow(dim, 0, index + 1)], "taken by position")
    return (call.tagger.layout(layers, shape, lambda core: core.select(dim, index)),)


@rule("unbind", "unbind_copy")
def unbind(call: Call) -> Sequence[Layers]:
    """Every element of a dimension by itself: how many there are is fixed."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.arg(1, "dim", 0), len(shape))
    fixed = [call.tagger.onto(core, frozenset({dim})) for core in layers if dim in varying(core)]
    call.tagger.freeze(fixed, "taken by position")
    return [
        call.tagger.layout(layers, shape, lambda core, i=index: core.select(dim, i)) for index in range(shape[dim])
    ]


@rule("index", "index_select", "gather", "take_along_dim", "_unsafe_index", "scatter", "scatter_add", "index_add",
      "index_put", "_index_put_impl", "index_copy", "index_fill", "masked_scatter")  # fmt: skip
def index(call: Call) -> Sequence[Layers]:
    """Elements by tables of positions: the indexed dimensions and the tables themselves stay as they are."""
    name = call.func._schema.name.partition("::")[2].rstrip("_")
    layers, shape = call.operand(call.args[0])
    if name in ("index", "_unsafe_index"):
        positions = [each for each in call.args[1] if each is not None]
        dims, at = [], 0
        for each in call.args[1]:
            width = each.dim() if each is not None and each.dtype in (torch.bool, torch.uint8) else 1
            dims += list(range(at, at + width)) if each is not None else []
            at += width
    elif name == "index_select":
        positions, dims = [call.args[2]], [axis(call.args[1], len(shape))]
    else:  # the rare ones: nothing moves
        call.tagger.freeze((core for each in call.tensors() for core in call.layers_of(each)), "scattered by positions")
        return (tuple(core for core in layers),)
    for each in positions:
        call.tagger.freeze(call.layers_of(each), "a table of positions")
    indexed = frozenset(dims)
    fixed = [call.tagger.onto(core, varying(core) & indexed) for core in layers if varying(core) & indexed]
    call.tagger.freeze(fixed, "indexed by position")
    return (call.tagger.layout(layers, shape, lambda core: call.func(core, *call.args[1:])),)


@rule("embedding")
def embedding(call: Call) -> Sequence[Layers]:
    """Rows by data: the rows stay, what is in them may go."""
    layers, _ = call.operand(call.args[0])
    rows = [core for core in layers if 0 in varying(core)]
    call.tagger.freeze(rows, "rows are looked up by data")
    call.tagger.freeze(call.layers_of(call.args[1]), "a table of positions")
    rank = call.outputs[0].dim()
    columns = [core for core in layers if varying(core) == {1}]
    return (tuple(core.reshape((1,) * (rank - 1) + (-1,)) for core in columns),)


# -- reductions ---------------------------------------------------------------------------------------------------------


@rule("sum", "mean", "nansum", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "prod", "logsumexp",
      "norm", "linalg_vector_norm", "all", "any", "aminmax", "argmax", "argmin")  # fmt: skip
def reduction(call: Call) -> Sequence[Layers]:
    """Over what is kept; positions of the largest element would shift, so argmax keeps its dimension whole."""
    name = call.func._schema.name.partition("::")[2]
    layers, shape = call.operand(call.args[0])
    rank = len(shape)
    if name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return pointwise(call)
    at = 2 if name in ("norm", "linalg_vector_norm") else 1
    dims = axes(call.arg(at, "dim"), rank)
    if name in ("argmax", "argmin"):
        call.tagger.freeze([core for core in layers if varying(core) & set(dims)], "the place of the largest")
    if name in ("max", "min") and len(call.outputs) > 1:
        call.tagger.freeze([core for core in layers if varying(core) & set(dims)], "the place of the largest")
    left = call.tagger.reduce(layers, dims)
    results = []
    for output in call.outputs:
        if output.dim() == rank:
            results.append(left)
        else:
            kept = [dim for dim in range(rank) if dim not in dims]
            results.append(tuple(core.reshape([core.shape[dim] for dim in kept]) for core in left))
    return results


# -- products -----------------------------------------------------------------------------------------------------------


@rule("mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv", "_addmm_activation", "addbmm")
def product(call: Call) -> Sequence[Layers]:
    """Matrix products, with what is added to them."""
    name = call.func._schema.name.partition("::")[2].rstrip("_")
    added = name in ("addmm", "baddbmm", "addmv", "_addmm_activation")
    if name == "addbmm":
        call.tagger.freeze((core for each in call.tensors() for core in call.layers_of(each)), "summed over a batch")
        return ()
    left, right = call.args[1:3] if added else call.args[:2]
    labels = {
        "mm": ("nk", "km", "nm"), "bmm": ("bnk", "bkm", "bnm"), "mv": ("nk", "k", "n"), "dot": ("k", "k", ""),
        "vdot": ("k", "k", ""),
    }  # fmt: skip
    kind = {"addmm": "mm", "_addmm_activation": "mm", "baddbmm": "bmm", "addmv": "mv"}.get(name, name)
    a, b, out = labels[kind]
    result = call.tagger.contract([(*call.operand(left), a), (*call.operand(right), b)], out)
    if added:
        shape = tuple(call.outputs[0].shape)
        result = call.tagger.merge([(result, shape), call.operand(call.args[0])], shape)
    return (result,)


@rule("_grouped_mm")
def grouped_product(call: Call) -> Sequence[Layers]:
    """Rows of a matrix by one of several matrices each: how many there are stays."""
    (rows, size), (stack_, shape) = call.operand(call.args[0]), call.operand(call.args[1])
    if len(size) != 2 or len(shape) != 3:
        call.tagger.freeze((*rows, *stack_), "grouped in a way that is not known")
        return ()
    call.tagger.freeze([core for core in stack_ if 0 in varying(core)], "the count of matrices stays")
    stack_ = tuple(core for core in stack_ if 0 not in varying(core))
    return (call.tagger.contract([(rows, size, "nk"), (stack_, shape, "gkm")], "nm"),)


@rule("topk", "sort", "argsort", "kthvalue", "median", "mode")
def ordered(call: Call) -> Sequence[Layers]:
    """Positions along the sorted dimension matter; the others pass."""
    layers, shape = call.operand(call.args[0])
    name = call.func._schema.name.partition("::")[2]
    at = 2 if name in ("topk", "kthvalue") else 1
    dim = axis(call.arg(at, "dim", -1), len(shape)) if not isinstance(call.arg(at, "dim", -1), bool) else len(shape) - 1
    fixed = [call.tagger.onto(core, frozenset({dim})) for core in layers if dim in varying(core)]
    call.tagger.freeze(fixed, "the order along it matters")
    left = tuple(core for core in layers if dim not in varying(core))
    if call.outputs[0].dim() != len(shape):
        left = tuple(core.squeeze(dim) for core in left)
    return (left,) * len(call.outputs)


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution")
def convolution(call: Call) -> Sequence[Layers]:
    """A product over channels, group by group; space is mixed and stays."""
    value, weight, bias = call.args[:3]
    transposed, groups = (call.args[6], call.args[8])
    (layers, shape), (kernel, size) = call.operand(value), call.operand(weight)
    if len(shape) == len(size) - 1:  # one sample without a batch
        layers, shape = tuple(core.unsqueeze(0) for core in layers), (1, *shape)
    rank = len(size)
    space = range(2, rank)
    layers = call.tagger.along(layers, space)
    kernel = call.tagger.along(kernel, space, "the kernel's extent stays")
    flat = [core.flatten(1) for core in layers], [core.flatten(1) for core in kernel]
    layers, kernel = (tuple(core.reshape(core.shape[0], -1) for core in each) for each in flat)
    inner, outer = (size[0] // groups, size[1]) if transposed else (size[1], size[0] // groups)
    grouped = call.tagger.layout(layers, (shape[0], groups * inner), lambda core: core.reshape(-1, groups, inner))
    parts = (groups, inner, outer) if transposed else (groups, outer, inner)
    whole = (size[0], size[1])
    kernel = call.tagger.layout(kernel, whole, lambda core: core.reshape(parts))
    result = call.tagger.contract(
        [(grouped, (shape[0], groups, inner), "ngi"), (kernel, parts, "gio" if transposed else "goi")], "ngo"
    )
    out = (shape[0], groups * outer)
    result = call.tagger.layout(result, (shape[0], groups, outer), lambda core: core.reshape(out))
    if bias is not None:
        result = call.tagger.merge([(result, out), call.operand(bias)], out)
    missing = call.outputs[0].dim() - 2
    result = tuple(core.reshape(*core.shape, *(1,) * missing) for core in result)
    if call.outputs[0].dim() != rank:
        result = tuple(core.squeeze(0) for core in result)
    return (result,)


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> Sequence[Layers]:
    """Directions times lengths."""
    direction, length = call.operand(call.args[0]), call.operand(call.args[1])
    return call.tagger.merge([direction, length], direction[1]), length[0]


# -- norms --------------------------------------------------------------------------------------------------------------


def _affine(call: Call, value: Operand, parameters: Sequence[Any], dims: Sequence[int]) -> Layers:
    """Couple a value with parameters that lie along some of its dimensions."""
    layers, shape = value
    operands: list[Operand] = [value]
    for parameter in parameters:
        if parameter is None:
            continue
        own, _ = call.operand(parameter)
        place = [shape[dim] if dim in dims else 1 for dim in range(len(shape))]
        spread = []
        for core in own:
            view = [1] * len(shape)
            for dim, extent in zip(dims, core.shape, strict=True):
                view[dim] = extent
            spread.append(core.reshape(view))
        operands.append((tuple(spread), place))
    return call.tagger.merge(operands, shape)


@rule("native_layer_norm", "_fused_rms_norm", "fused_layer_norm", "rms_norm")
def layer_norm(call: Call) -> Sequence[Layers]:
    """Over the kept part of the last dimensions."""
    value = call.operand(call.args[0])
    rank = len(value[1])
    dims = range(rank - len(call.args[1]), rank)
    layers = _affine(call, value, call.args[2:4], dims) if len(call.args) > 2 else value[0]
    return (layers, *[call.tagger.reduce(layers, dims)] * (len(call.outputs) - 1))


@rule("native_group_norm")
def group_norm(call: Call) -> Sequence[Layers]:
    """Groups of neighbouring channels stay of equal size."""
    value, groups = call.args[0], call.args[6]
    layers, shape = call.operand(value)
    layers = call.tagger.along(layers, range(2, len(shape)))
    layers = _affine(call, (layers, shape), call.args[1:3], [1])
    for core in layers:
        if varying(core) == {1} and groups > 1:
            call.tagger.balance(core.reshape(groups, -1).unbind(0))
        elif 1 in varying(core) and groups > 1:
            call.tagger.freeze([core], "normalised by groups across another dimension")
    return (layers,)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm", "_native_batch_norm_legit_functional",
      "miopen_batch_norm")  # fmt: skip
def batch_norm(call: Call) -> Sequence[Layers]:
    """One scale, shift, mean and variance per channel."""
    value = call.operand(call.args[0])
    parameters = [each for each in call.args[1:5] if isinstance(each, Tensor)]
    layers = _affine(call, value, parameters, [1])
    per_channel = call.tagger.reduce(layers, [dim for dim in range(len(value[1])) if dim != 1])
    saved = tuple(core.reshape(-1) for core in per_channel)
    return layers, *(saved if tuple(each.shape) == value[1][1:2] else () for each in call.outputs[1:])


# -- space --------------------------------------------------------------------------------------------------------------

SPATIAL = {
    **{f"{kind}{rank}d": rank for rank in (1, 2, 3) for kind in (
        "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "reflection_pad",
        "replication_pad", "upsample_bicubic", "upsample_nearest", "_upsample_nearest_exact", "max_pool",
        "grid_sampler_")},
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "fractional_max_pool2d": 2,
    "upsample_linear1d": 1, "upsample_bilinear2d": 2, "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3, "grid_sampler_2d": 2, "grid_sampler_3d": 3, "pool_depthwise": 2,
    "mkldnn_max_pool2d": 2, "quantized_max_pool2d": 2,
}  # fmt: skip


@rule(*SPATIAL)
def spatial(call: Call) -> Sequence[Layers]:
    """Pools, resizes and samples neighbours in the last dimensions; channels pass."""
    name = call.func._schema.name.partition("::")[2]
    layers, shape = call.operand(call.args[0])
    space = range(len(shape) - SPATIAL[name], len(shape))
    result = call.tagger.along(layers, space)
    for each in list(call.tensors())[1:]:
        call.tagger.freeze(call.layers_of(each), "positions in space")
    return (result,) * len(call.outputs)


@rule("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
def region(call: Call) -> Sequence[Layers]:
    """Regions of a feature map: channels pass, except where they are taken by place."""
    name = call.func._schema.name.partition("::")[2]
    layers, _ = call.operand(call.args[0])
    for each in list(call.tensors())[1:]:
        call.tagger.freeze(call.layers_of(each), "positions in space")
    if name.startswith("ps_"):
        call.tagger.freeze(layers, "channels are taken by place")
        return ()
    return (tuple(core for core in call.tagger.along(layers, (0, 2, 3))),)


@rule("im2col")
def im2col(call: Call) -> Sequence[Layers]:
    """Patches: channels by kernel positions, one after the other."""
    layers, shape = call.operand(call.args[0])
    layers = call.tagger.along(layers, (len(shape) - 2, len(shape) - 1))
    area = math.prod(call.args[1])
    size = tuple(call.outputs[0].shape)
    dim = len(shape) - 3
    return (
        call.tagger.note(
            tuple(core.squeeze(-1).repeat_interleave(area, dim) for core in layers if varying(core) <= {dim})
        )
        if len(size) == len(shape) - 1
        else (),
    )


@rule("col2im")
def col2im(call: Call) -> Sequence[Layers]:
    """Patches folded back: positions of one channel go together."""
    layers, shape = call.operand(call.args[0])
    area = math.prod(call.args[2])
    dim = len(shape) - 2
    result = []
    for core in call.tagger.along(layers, (dim + 1,)):
        split_ = core.reshape(*core.shape[:dim], -1, area)
        (whole,) = call.tagger.along((split_,), (split_.dim() - 1,)) or (None,)
        if whole is not None:
            result.append(whole.reshape(*core.shape[:dim], -1, 1, 1))
    return (tuple(result),)
