"""Elementwise operations, reductions, and what is created from nothing."""

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
    """The tags of the first operand, unchanged; a softmax runs over what is kept."""
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


@rule("cummax", "cummin")
def running(call: Call) -> Sequence[Layers]:
    """The largest so far, of what is kept; its places are positions."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.arg(1, "dim"), len(shape))
    call.positions(call.outputs[1], [core for core in layers if dim in varying(core)], "the place of the largest")
    return (layers, layers)


@rule("glu")
def gated(call: Call) -> Sequence[Layers]:
    """One half of a dimension times the sigmoid of the other: channels go in pairs."""
    layers, shape = call.operand(call.args[0])
    dim = axis(call.arg(1, "dim", -1), len(shape))
    half, size = shape[dim] // 2, tuple(call.outputs[0].shape)
    halves = [
        call.tagger.layout(layers, shape, partial(torch.narrow, dim=dim, start=start, length=half))
        for start in (0, half)
    ]
    return (call.tagger.merge([(halve, size) for halve in halves], size),)


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
    """Over what is kept; positions of the largest would shift, so what reads them keeps the dimension whole."""
    name = call.func._schema.name.partition("::")[2]
    layers, shape = call.operand(call.args[0])
    rank = len(shape)
    if name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        return pointwise(call)
    at = 2 if name in ("norm", "linalg_vector_norm") else 1
    dims = axes(call.arg(at, "dim"), rank)
    if name in ("argmax", "argmin") or (len(call.outputs) > 1 and name in ("max", "min", "median", "nanmedian")):
        fixed = [core for core in layers if varying(core) & set(dims)]
        call.positions(call.outputs[-1], fixed, "the place of the largest")
    left = call.tagger.reduce(layers, dims)
    results = []
    for output in call.outputs:
        if output.dim() == rank:
            results.append(left)
        else:
            kept = [dim for dim in range(rank) if dim not in dims]
            results.append(tuple(core.reshape([core.shape[dim] for dim in kept]) for core in left))
    return results
