"""Inputs and outputs of layers: where statistics are measured, and along which axis the channels lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

# names of torch's functions, the same for all forms of a function: relu, relu_, Tensor.relu, functional.relu
ACTIVATIONS = frozenset(
    {
        "relu",
        "relu6",
        "leaky_relu",
        "rrelu",
        "prelu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardtanh",
        "hardshrink",
        "softshrink",
        "softplus",
        "threshold",
        "tanh",
    }
)
KEEP_CHANNELS = frozenset(
    {
        "batch_norm",
        "layer_norm",
        "group_norm",
        "instance_norm",
        "rms_norm",
        "add",
        "iadd",
        "radd",
        "dropout",
        "feature_dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "contiguous",
    }
)
SIZES = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim")


class Outlets(TorchFunctionMode):
    """Follows the output of every module, through norms and residual additions, to the activation function behind it.

    Channels that a ReLU silences show only there, and a convolution before a batch norm has no scale of its own.
    Calls `seen(path, output, activated)` for every output, and again for the result of the activation function.
    """

    def __init__(self, seen: Callable[[str, Tensor, bool], None]) -> None:
        super().__init__()
        self.seen = seen
        self.origins: Any = WeakTensorKeyDictionary()  # module paths by output; keeps no activation alive

    def follow(self, path: str, module: nn.Module) -> Any:
        """Follow the outputs of `module` from now on; returns the handle that stops it."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.origins[output] = {*self.origins.get(output, ()), path}
                self.seen(path, output, False)

        return module.register_forward_hook(hook)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name not in ACTIVATIONS and name not in KEEP_CHANNELS:
            return func(*args, **(kwargs or {}))
        tensors = [argument for argument in (*args, *(kwargs or {}).values()) if isinstance(argument, Tensor)]
        origins = [(tensor.shape, self.origins.get(tensor, ())) for tensor in tensors]
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            paths = {path for shape, sources in origins if shape == output.shape for path in sources}
            self.origins[output] = paths if name in KEEP_CHANNELS else set()
            if name in ACTIVATIONS:
                for path in sorted(paths):
                    self.seen(path, output, True)
        return output


def channel_axis(module: nn.Module, output: Tensor) -> int | None:
    """The axis of a batched output that holds the module's channels: the second after convolutions, else the last.

    Takes the other of the two if only its size is the number of channels, as after a layer norm on images.
    """
    weight = getattr(module, "weight", None)
    sizes = (getattr(module, name, None) for name in SIZES)
    fallback = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() else None
    size = next((number for number in sizes if isinstance(number, int)), fallback)
    last = output.dim() - 1
    axes = (1, last) if isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm)) else (last, 1)
    return next((axis for axis in axes if 0 < axis <= last and output.shape[axis] == size), None)


def batched(module: nn.Module, output: Tensor) -> tuple[Tensor, int] | None:
    """The output with a batch dimension, which a single sample may lack, and its channel axis; None without one."""
    if not output.is_floating_point() or not output.dim():
        return None
    if output.dim() == (len(module.kernel_size) + 1 if isinstance(module, _ConvNd) else 1):
        output = output.unsqueeze(0)
    axis = channel_axis(module, output)
    return None if axis is None else (output, axis)


def by_sample(activation: Tensor, gradient: Tensor, axis: int, samples: int) -> Tensor:
    """The sum of a * da over each sample's positions: (samples, channels).

    Rows that a model folds into the batch dimension sample by sample, such as windows or tokens, are positions too.
    If the number of rows is no multiple of the number of samples, every row counts as a sample.
    """
    others = [dim for dim in range(1, activation.dim()) if dim != axis]
    rows = activation * gradient
    rows = rows.sum(others) if others else rows
    if rows.shape[0] != samples and rows.shape[0] % samples == 0:
        rows = rows.reshape(samples, -1, rows.shape[-1]).sum(1)
    return rows


def input_squares(module: nn.Module, given: Tensor) -> Tensor | None:
    """The sum of the squared inputs of each weight; None for layers that are neither linear nor convolutional.

    Shapes: (..., in) -> (in,) for linear layers; (batch, in, ...) -> (in, *kernel) for convolutions, one number
    per tap; -> (in, 1, ...) for transposed ones, where every tap meets the whole input (except cropped borders).
    """
    if not isinstance(module, _ConvNd):
        fits = getattr(module, "in_features", None) == given.shape[-1] and getattr(module, "weight", given).dim() == 2
        return given.square().reshape(-1, given.shape[-1]).sum(0) if fits else None
    spatial = len(module.kernel_size)
    squares = given.square()
    squares = squares.unsqueeze(0) if given.dim() == spatial + 1 else squares
    if module.transposed:
        return squares.sum([0, *range(2, 2 + spatial)]).reshape(-1, *[1] * spatial)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    squares = functional.pad(squares, module._reversed_padding_repeated_twice, mode=mode)
    taps = []
    for tap in product(*map(range, module.kernel_size)):
        window = squares
        for axis, (offset, kernel, stride, dilation) in enumerate(
            zip(tap, module.kernel_size, module.stride, module.dilation, strict=True), 2
        ):
            start, reach = offset * dilation, (kernel - 1) * dilation
            window = window.narrow(axis, start, window.shape[axis] - reach)
            window = window[(slice(None),) * axis + (slice(None, None, stride),)]
        taps.append(window.sum([0, *range(2, 2 + spatial)]))
    return torch.stack(taps, 1).reshape(-1, *module.kernel_size)


def facing(module: nn.Module, norm: Tensor) -> Tensor:
    """The input norm, shaped to broadcast against the module's weight; grouped filters get their own inputs only."""
    if not isinstance(module, _ConvNd):
        return norm.unsqueeze(0)
    if module.transposed:
        return norm.unsqueeze(1)
    groups = norm.reshape(module.groups, -1, *norm.shape[1:])
    return groups if module.groups == 1 else groups.repeat_interleave(module.out_channels // module.groups, 0)
