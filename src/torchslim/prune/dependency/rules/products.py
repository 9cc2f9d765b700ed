"""Rules for products, norms, and operations that mix neighbors in space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from torchslim.core.reason import Reason
from torchslim.prune.dependency.propagation import Layers, Operand, varying
from torchslim.prune.dependency.rules.registry import Call, axis, rule


@rule("mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv", "_addmm_activation", "addbmm")
def product(call: Call) -> Sequence[Layers]:
    """Matrix products, with or without an added tensor."""
    name = call.func._schema.name.partition("::")[2].rstrip("_")
    added = name in ("addmm", "baddbmm", "addmv", "_addmm_activation")
    if name == "addbmm":
        call.tagger.freeze(
            (core for tensor in call.tensors() for core in call.layers_of(tensor)), "summed over a batch"
        )
        return ()
    left, right = call.args[1:3] if added else call.args[:2]
    labels = {
        "mm": ("nk", "km", "nm"),
        "bmm": ("bnk", "bkm", "bnm"),
        "mv": ("nk", "k", "n"),
        "dot": ("k", "k", ""),
        "vdot": ("k", "k", ""),
    }
    kind = {"addmm": "mm", "_addmm_activation": "mm", "baddbmm": "bmm", "addmv": "mv"}.get(name, name)
    left_labels, right_labels, out = labels[kind]
    result = call.tagger.contract([(*call.operand(left), left_labels), (*call.operand(right), right_labels)], out)
    if added:
        shape = tuple(call.outputs[0].shape)
        result = call.tagger.merge([(result, shape), call.operand(call.args[0])], shape)
    return (result,)


@rule("_grouped_mm")
def grouped_product(call: Call) -> Sequence[Layers]:
    """Groups of a matrix's rows, each times one matrix of a stack: the number of matrices is fixed."""
    (rows, size), (stack_, shape) = call.operand(call.args[0]), call.operand(call.args[1])
    if len(size) != 2 or len(shape) != 3:
        call.tagger.freeze((*rows, *stack_), "grouped in a way that is not known")
        return ()
    call.tagger.freeze([core for core in stack_ if 0 in varying(core)], "the count of matrices stays")
    stack_ = tuple(core for core in stack_ if 0 not in varying(core))
    return (call.tagger.contract([(rows, size, "nk"), (stack_, shape, "gkm")], "nm"),)


@rule("_cdist_forward", "cdist", "_euclidean_dist")
def distances(call: Call) -> Sequence[Layers]:
    """Distances between rows of two matrices: channels removed from both add no difference."""
    (left, size), (right, shape) = call.operand(call.args[0]), call.operand(call.args[1])
    rank = len(call.outputs[0].shape)
    batch = "abcdefgh"[: rank - 2]
    left, right = (
        tuple(core.reshape((1,) * (rank - core.dim()) + tuple(core.shape)) for core in layers)
        for layers in (left, right)
    )
    size, shape = ((1,) * (rank - len(dims)) + tuple(dims) for dims in (size, shape))
    return (call.tagger.contract([(left, size, f"{batch}nk"), (right, shape, f"{batch}mk")], f"{batch}nm"),)


@rule("_trilinear")
def trilinear(call: Call) -> Sequence[Layers]:
    """Product of three operands with inserted dimensions of size 1, summed over some dimensions."""
    operands = []
    for value, added in zip(call.args[:3], call.args[3:6], strict=True):
        layers, shape = call.operand(value)
        size = list(shape)
        for dim in sorted(added):
            layers, size = tuple(core.unsqueeze(dim) for core in layers), [*size[:dim], 1, *size[dim:]]
        operands.append((layers, size))
    merged = call.tagger.merge(operands, np.broadcast_shapes(*(tuple(size) for _, size in operands)))
    summed = set(call.args[6])
    reduced = call.tagger.reduce(merged, summed)
    kept = [dim for dim in range(len(operands[0][1])) if dim not in summed]
    return (call.tagger.note(tuple(core.reshape([core.shape[dim] for dim in kept]) for core in reduced)),)


@rule("topk", "sort", "argsort", "kthvalue", "mode")
def ordered(call: Call) -> Sequence[Layers]:
    """Freeze the sorted dimension, whose positions matter; other dimensions pass."""
    layers, shape = call.operand(call.args[0])
    name = call.func._schema.name.partition("::")[2]
    dim_index = 2 if name in ("topk", "kthvalue") else 1
    dim = (
        axis(call.arg(dim_index, "dim", -1), len(shape))
        if not isinstance(call.arg(dim_index, "dim", -1), bool)
        else len(shape) - 1
    )
    fixed = [call.tagger.onto(core, frozenset({dim})) for core in layers if dim in varying(core)]
    call.tagger.freeze(fixed, "the order along it matters")
    passing = tuple(core for core in layers if dim not in varying(core))
    if call.outputs[0].dim() != len(shape):
        passing = tuple(core.squeeze(dim) for core in passing)
    return (passing,) * len(call.outputs)


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution")
def convolution(call: Call) -> Sequence[Layers]:
    """A product over channels, group by group; space is mixed and stays, except for kernels of one position."""
    value, weight, bias = call.args[:3]
    stride, padding = call.args[3:5]
    (layers, shape), (_, size) = call.operand(value), call.operand(weight)
    unbatched = len(shape) == len(size) - 1  # one sample without a batch
    if unbatched:
        layers, shape = tuple(core.unsqueeze(0) for core in layers), (1, *shape)
    spatial = any(extent != 1 for extent in (*size[2:], *stride)) or any(padding)
    result = _convolved(call, (layers, shape), weight, bias, call.args[8], transposed=call.args[6], spatial=spatial)
    return (tuple(core.squeeze(0) for core in result) if unbatched else result,)


def _convolved(
    call: Call, value: Operand, weight: Tensor, bias: Tensor | None, groups: int, *, transposed: bool, spatial: bool
) -> Layers:
    """Layers of the result of a convolution of a batch, group by group; if `spatial`, it mixes neighbors in space."""
    (layers, shape), (kernel, size) = value, call.operand(weight)
    space = range(2, len(size))
    extent = shape[2:]
    if spatial:
        layers, extent = call.tagger.along(layers, space), (1,) * len(space)
    kernel = call.tagger.along(kernel, space, Reason.KERNEL_EXTENT)
    kernel = tuple(core.flatten(1) for core in kernel)
    inner, outer = (size[0] // groups, size[1]) if transposed else (size[1], size[0] // groups)
    value_shape = (shape[0], groups * inner, *extent)
    grouped_shape = (shape[0], groups, inner, *extent)
    grouped = call.tagger.layout(layers, value_shape, lambda core: core.reshape(grouped_shape))
    kernel_shape = (groups, inner, outer) if transposed else (groups, outer, inner)
    kernel = call.tagger.layout(kernel, (size[0], size[1]), lambda core: core.reshape(kernel_shape))
    space_labels = "xyz"[: len(space)]
    result = call.tagger.contract(
        [(grouped, grouped_shape, f"ngi{space_labels}"), (kernel, kernel_shape, "gio" if transposed else "goi")],
        f"ngo{space_labels}",
    )
    out = (shape[0], groups * outer, *extent)
    result = call.tagger.layout(result, (shape[0], groups, outer, *extent), lambda core: core.reshape(out))
    if bias is not None:
        bias_layers, bias_shape = call.operand(bias)
        result = call.tagger.merge(
            [
                (result, out),
                (
                    tuple(core.reshape(-1, *(1,) * len(space)) for core in bias_layers),
                    (*bias_shape, *(1,) * len(space)),
                ),
            ],
            out,
        )
    return result


@rule("deform_conv2d", "_deform_conv2d")
def deformable(call: Call) -> Sequence[Layers]:
    """A convolution at positions from offsets; every group of offsets serves an equal share of the channels."""
    value, weight, offset, mask, bias = call.args[:5]
    groups, offset_groups = call.args[11:13]
    for tensor in (offset, mask):
        moved = call.tagger.along(call.layers_of(tensor), (2, 3))
        call.tagger.freeze([core for core in moved if 1 in varying(core)], "offsets of a kernel stay")
    layers, shape = call.operand(value)
    if offset_groups > 1:
        _equal_groups(call, call.tagger.along(layers, (2, 3)), offset_groups)
    return (_convolved(call, (layers, shape), weight, bias, groups, transposed=False, spatial=True),)


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> Sequence[Layers]:
    """A weight as directions times lengths."""
    direction, length = call.operand(call.args[0]), call.operand(call.args[1])
    return call.tagger.merge([direction, length], direction[1]), length[0]


def _affine(call: Call, value: Operand, parameters: Sequence[Any], dims: Sequence[int]) -> Layers:
    """Couple a value with parameters that lie along some of its dimensions."""
    _, shape = value
    operands: list[Operand] = [value]
    for parameter in parameters:
        if parameter is None:
            continue
        layers, _ = call.operand(parameter)
        aligned_shape = [shape[dim] if dim in dims else 1 for dim in range(len(shape))]
        aligned = []
        for core in layers:
            view = [1] * len(shape)
            for dim, extent in zip(dims, core.shape, strict=True):
                view[dim] = extent
            aligned.append(core.reshape(view))
        operands.append((tuple(aligned), aligned_shape))
    return call.tagger.merge(operands, shape)


@rule("native_layer_norm", "_fused_rms_norm", "fused_layer_norm", "rms_norm")
def layer_norm(call: Call) -> Sequence[Layers]:
    """Normalize over the kept elements of the last dimensions."""
    value = call.operand(call.args[0])
    rank = len(value[1])
    dims = range(rank - len(call.args[1]), rank)
    layers = _affine(call, value, call.args[2:4], dims) if len(call.args) > 2 else value[0]
    return (layers, *[call.tagger.reduce(layers, dims)] * (len(call.outputs) - 1))


@rule("native_group_norm")
def group_norm(call: Call) -> Sequence[Layers]:
    """Groups of neighboring channels stay of equal size."""
    value, groups = call.args[0], call.args[6]
    layers, shape = call.operand(value)
    layers = call.tagger.along(layers, range(2, len(shape)))
    layers = _affine(call, (layers, shape), call.args[1:3], [1])
    if groups > 1:
        _equal_groups(call, layers, groups)
    return (layers,)


def _equal_groups(call: Call, layers: Layers, groups: int) -> None:
    """Keep groups of neighboring channels at equal size."""
    for core in layers:
        if varying(core) == {1}:
            call.tagger.balance(core.reshape(groups, -1).unbind(0))
        elif 1 in varying(core):
            call.tagger.freeze([core], "grouped across another dimension")


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "batch_norm",
    "_native_batch_norm_legit_functional",
    "miopen_batch_norm",
)
def batch_norm(call: Call) -> Sequence[Layers]:
    """One scale, shift, mean and variance per channel."""
    value = call.operand(call.args[0])
    parameters = [argument for argument in call.args[1:5] if isinstance(argument, Tensor)]
    layers = _affine(call, value, parameters, [1])
    per_channel = call.tagger.reduce(layers, [dim for dim in range(len(value[1])) if dim != 1])
    saved = tuple(core.reshape(-1) for core in per_channel)
    return layers, *(saved if tuple(output.shape) == value[1][1:2] else () for output in call.outputs[1:])


SPATIAL = {
    **{
        f"{kind}{rank}d": rank
        for rank in (1, 2, 3)
        for kind in (
            "avg_pool",
            "adaptive_avg_pool",
            "_adaptive_avg_pool",
            "adaptive_max_pool",
            "reflection_pad",
            "replication_pad",
            "upsample_bicubic",
            "upsample_nearest",
            "_upsample_nearest_exact",
            "max_pool",
            "grid_sampler_",
        )
    },
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "fractional_max_pool2d": 2,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3,
    "grid_sampler_2d": 2,
    "grid_sampler_3d": 3,
    "pool_depthwise": 2,
    "mkldnn_max_pool2d": 2,
    "quantized_max_pool2d": 2,
}


@rule(*SPATIAL)
def spatial(call: Call) -> Sequence[Layers]:
    """Pool, pad, resize or sample in the last dimensions; channels pass."""
    name = call.func._schema.name.partition("::")[2]
    layers, shape = call.operand(call.args[0])
    space = range(len(shape) - SPATIAL[name], len(shape))
    result = call.tagger.along(layers, space)
    for tensor in list(call.tensors())[1:]:
        call.tagger.freeze(call.layers_of(tensor), "positions in space")
    return (result,) * len(call.outputs)


@rule("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
def region(call: Call) -> Sequence[Layers]:
    """Regions of a feature map: channels pass, except where an operation takes them by position."""
    name = call.func._schema.name.partition("::")[2]
    layers, _ = call.operand(call.args[0])
    for tensor in list(call.tensors())[1:]:
        call.tagger.freeze(call.layers_of(tensor), "positions in space")
    if name.startswith("ps_"):
        call.tagger.freeze(layers, "channels are taken by place")
        return ()
    return (tuple(core for core in call.tagger.along(layers, (0, 2, 3))),)


@rule("im2col")
def im2col(call: Call) -> Sequence[Layers]:
    """Unfold patches: every channel becomes one channel per kernel position, one after the other."""
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
    """Fold patches back: the kernel positions of a channel are coupled."""
    layers, shape = call.operand(call.args[0])
    area = math.prod(call.args[2])
    dim = len(shape) - 2
    result = []
    for core in call.tagger.along(layers, (dim + 1,)):
        split_ = core.reshape(*core.shape[:dim], -1, area)
        (coupled,) = call.tagger.along((split_,), (split_.dim() - 1,)) or (None,)
        if coupled is not None:
            result.append(coupled.reshape(*core.shape[:dim], -1, 1, 1))
    return (tuple(result),)
