"""Rules for elementwise operations, reductions, and operations that create values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from torchslim.prune.dependency.propagation import Layers, varying
from torchslim.prune.dependency.rules.registry import Call, axes, axis, rule


@rule(
    "masked_fill",
    "where",
    "addcmul",
    "addcdiv",
    "lerp",
    "_prelu_kernel",
    "copy",
    "dropout",
    "fill",
    "clamp",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "mish",
    "leaky_relu",
    "elu",
    "celu",
    "gelu",
    "silu",
    "softplus",
    "log_sigmoid_forward",
    "relu6",
    "threshold",
    "_fake_quantize_per_tensor_affine",
    "rrelu_with_noise",
)
def pointwise(call: Call) -> Sequence[Layers]:
    """Broadcast and couple all operands."""
    operands = [call.operand(tensor) for tensor in call.tensors()]
    shape = np.broadcast_shapes(*(tuple(size) for _, size in operands)) if operands else ()
    return (call.tagger.merge(operands, shape),)


@rule(
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "contiguous",
    "lift_fresh",
    "lift_fresh_copy",
    "zero",
    "native_dropout",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "bernoulli",
    "uniform",
    "normal",
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "random",
    "exponential",
    "resolve_conj",
    "resolve_neg",
    "_conj",
    "nan_to_num",
    "logit",
    "glu_jvp",
    "positive",
)
def same(call: Call) -> Sequence[Layers]:
    """The tags of the first operand, unchanged; a softmax runs over the kept elements."""
    layers, _ = call.operand(call.args[0])
    return (layers,) * len(call.outputs)


@rule(
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "empty_strided",
    "new_empty_strided",
    "scalar_tensor",
)
def created(call: Call) -> Sequence[Layers]:
    """Values whose positions have no meaning: their sizes adapt to the values that they meet."""
    return (call.tagger.own(call.outputs[0].shape, elastic=True),)


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "size", "sym_size")
def counted(call: Call) -> Sequence[Layers]:
    """Values that stand for positions: their size is fixed."""
    return ()


@rule("tril", "triu")
def triangle(call: Call) -> Sequence[Layers]:
    """Freeze the last two dimensions, whose positions matter."""
    layers, shape = call.operand(call.args[0])
    dims = {len(shape) - 2, len(shape) - 1}
    fixed = [call.tagger.onto(core, varying(core) & dims) for core in layers if varying(core) & dims]
    call.tagger.freeze(fixed, "positions matter to a triangle")
    return (layers,)


@rule("cummax", "cummin")
def running(call: Call) -> Sequence[Layers]:
    """Running extremes of the kept elements; the second output holds their positions."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.arg(1, "dim"), len(shape))
    call.positions(call.outputs[1], [core for core in layers if dim in varying(core)], "the place of the largest")
    return (layers, layers)


@rule("glu")
def gated(call: Call) -> Sequence[Layers]:
    """One half of a dimension times the sigmoid of the other: channels are removed in pairs."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.arg(1, "dim", -1), len(shape))
    half, size = shape[dim] // 2, tuple(call.outputs[0].shape)
    halves = [
        call.tagger.layout(layers, shape, partial(torch.narrow, dim=dim, start=start, length=half))
        for start in (0, half)
    ]
    return (call.tagger.merge([(half_layers, size) for half_layers in halves], size),)


@rule("bucketize")
def bucketized(call: Call) -> Sequence[Layers]:
    """The bucket of each element; the boundaries stay."""
    layers, _ = call.operand(call.args[0])
    call.tagger.freeze(call.layers_of(call.args[1]), "boundaries of buckets stay")
    return (layers,)


@rule(
    "sum",
    "mean",
    "nansum",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "amax",
    "amin",
    "max",
    "min",
    "prod",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "median",
    "nanmedian",
    "all",
    "any",
    "aminmax",
    "argmax",
    "argmin",
)
def reduction(call: Call) -> Sequence[Layers]:
    """Reduce over the kept elements; an operation that reads positions of extremes freezes the dimension."""
    name = call.func._schema.name.partition("::")[2]
    layers, shape = call.operand(call.args[0])
    rank = len(shape)
    if name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return pointwise(call)
    dim_index = 2 if name in ("norm", "linalg_vector_norm") else 1
    dims = axes(call.arg(dim_index, "dim"), rank)
    if name in ("argmax", "argmin") or (len(call.outputs) > 1 and name in ("max", "min", "median", "nanmedian")):
        fixed = [core for core in layers if varying(core) & set(dims)]
        call.positions(call.outputs[-1], fixed, "the place of the largest")
    reduced = call.tagger.reduce(layers, dims)
    results = []
    for output in call.outputs:
        if output.dim() == rank:
            results.append(reduced)
        else:
            kept = [dim for dim in range(rank) if dim not in dims]
            results.append(tuple(core.reshape([core.shape[dim] for dim in kept]) for core in reduced))
    return results
