"""Rounding of weights that changes a layer's output least: GPTQ and AdaRound.

Both treat layers one at a time, from the second moments of the input: with H = sum x x^T over calibration inputs, the
squared output error of a row is (w_q - w) H (w_q - w)^T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torchslim.quantize.aten_ops import Weighted

Quantizer = Callable[[Tensor, Tensor], Tensor]
"""(values, scales) of one column -> the values on the grid."""


def columns(node: Node, layer: Weighted, value: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A layer's input as (groups, positions, inputs of one output), which the rows of its weight multiply."""
    if layer.kind == "linear":
        return value.flatten(0, -2).unsqueeze(0)
    rank = len(kernel)
    arguments: list[Any] = [*node.args[3:7], *[None] * 4]
    stride, padding, dilation, groups = arguments[:4]
    stride, dilation = (_each(setting, rank, 1) for setting in (stride, dilation))
    groups = int(groups or 1)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [(width // 2, width - width // 2) for width in total]
    else:
        pads = [(width, width) for width in _each(padding, rank, 0)]
    value = torch.nn.functional.pad(value, [edge for pair in reversed(pads) for edge in pair])
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        reach = gap * (size - 1) + 1
        value = value.unfold(dim, reach, step)[..., ::gap]
    # (batch, channels, *positions, *kernel) -> (groups, batch * positions, channels of the group * kernel)
    batch, channels = value.shape[:2]
    value = value.reshape(batch, groups, channels // groups, -1, *kernel)
    order = (1, 0, 3, 2, *range(4, 4 + rank))
    return value.permute(order).reshape(groups, -1, channels // groups * _product(kernel))


def gptq(weight: Tensor, scales: Tensor, second: Tensor, low: int, high: int, damping: float = 0.01) -> Tensor:
    """Round column after column; the following columns compensate for the error.

    Source: Frantar et al. 2023, "GPTQ", arXiv:2210.17323, algorithm 1.

    Args:
        weight: (rows, inputs).
        scales: (rows, inputs): the step of each weight.
        second: (inputs, inputs): second moments of the input.
        low: the smallest integer.
        high: the largest integer.
        damping: fraction of the diagonal's mean that is added to the diagonal.

    Returns the integers, (rows, inputs), as floats.
    """
    remaining = weight.double().clone()
    steps = scales.double()
    moments = second.double().clone()
    dead = moments.diagonal() == 0
    moments[dead, dead] = 1
    moments.diagonal().add_(damping * moments.diagonal().mean())
    order = moments.diagonal().argsort(descending=True)
    restore = order.argsort()
    remaining, steps, moments = remaining[:, order], steps[:, order], moments[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse, upper=True)
    integers = torch.empty_like(remaining)
    for start in range(0, remaining.shape[1], 128):
        stop = min(start + 128, remaining.shape[1])
        errors = torch.empty(remaining.shape[0], stop - start, dtype=torch.float64, device=remaining.device)
        for index in range(start, stop):
            column = (remaining[:, index] / steps[:, index]).round().clamp(low, high)
            integers[:, index] = column
            error = (remaining[:, index] - column * steps[:, index]) / upper[index, index]
            remaining[:, index:stop] -= error.unsqueeze(1) * upper[index, index:stop]
            errors[:, index - start] = error
        remaining[:, stop:] -= errors @ upper[start:stop, stop:]
    return integers[:, restore]


def adaround(
    weight: Tensor,
    scales: Tensor,
    second: Tensor,
    low: int,
    high: int,
    *,
    steps: int = 1000,
    lr: float = 3e-2,
    regularization: float = 0.1,
) -> Tensor:
    """Learn for each weight whether it is rounded up or down.

    Minimizes the squared output error plus a term that drives h(v) to 0 or 1, h the rectified sigmoid. Source: Nagel et
    al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568, eq. 21-24.

    Args:
        weight: (rows, inputs).
        scales: (rows, inputs): the step of each weight.
        second: (inputs, inputs): second moments of the input.
        low: the smallest integer.
        high: the largest integer.
        steps: number of steps of Adam.
        lr: learning rate of Adam.
        regularization: lambda, relative to the error of rounding to nearest.

    Returns the integers, (rows, inputs), as floats.
    """
    target, step = weight.float(), scales.float()
    scaled = target / step
    below = scaled.floor()
    nearest = scaled.round().clamp(low, high)
    moments = (second / second.diagonal().mean().clamp(min=1e-30)).float()

    def error(values: Tensor) -> Tensor:
        return ((values @ moments) * values).sum()

    reference = float(error((nearest - scaled) * step)) + 1e-30
    stretch, shift = 1.2, -0.1  # zeta - gamma, gamma
    fraction = (scaled - below).clamp(1e-4, 1 - 1e-4)
    learned = torch.logit(((fraction - shift) / stretch).clamp(1e-4, 1 - 1e-4)).requires_grad_()
    optimizer = torch.optim.Adam([learned], lr=lr)
    for index in range(steps):
        progress = index / steps
        up = (torch.sigmoid(learned) * stretch + shift).clamp(0, 1)
        values = ((below + up).clamp(low, high) - scaled) * step
        # the gradient is that of the error, 2 values M, with one matrix product where autograd takes three
        loss = 2 * ((values.detach() @ moments) * values).sum() / reference
        if progress > 0.2:  # beta falls from 20 to 2
            beta = 2 + 18 * (1 - (progress - 0.2) / 0.8)
            loss = loss + regularization * (1 - (2 * up - 1).abs().pow(beta)).sum() / learned.shape[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    up = (torch.sigmoid(learned.detach()) * stretch + shift).clamp(0, 1) >= 0.5
    rounded = (below + up).clamp(low, high)
    better = error((rounded - scaled) * step) <= error((nearest - scaled) * step)
    return rounded if better else nearest


def _each(value: Any, rank: int, default: int) -> list[int]:
    if value is None or value == []:
        return [default] * rank
    if isinstance(value, int):
        return [value] * rank
    return [int(size) for size in value] * (rank if len(value) == 1 else 1)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
