"""Recurrent layers in a capture: their outputs' shapes by formula, in place of a run over every time step.

PyTorch computes the fake outputs of an LSTM, GRU or RNN by unrolling it, which takes seconds for a hundred steps and
fixes their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.export import ExportedProgram

from torchslim.core.isolation import Shared
from torchslim.errors import DeployError

aten = torch.ops.aten
LAYERS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


@Shared
@contextmanager
def recurrent_kept_whole() -> Iterator[None]:
    """Inside, captures compute the shapes of recurrent layers by formula, so that the number of steps stays free.

    Decompositions replace the kernels of the layers that they keep; then fake tensors read torch's table instead.
    """
    kernels: list[tuple[Any, Any, Callable[..., Any]]] = []
    unrolled = {layer: decomposition_table[layer] for layer in LAYERS if layer in decomposition_table}
    for layer in LAYERS:
        shapes = _lstm if layer is aten.lstm.input else _single
        for key, kernel in list(layer.py_kernels.items()):
            kernels.append((layer, key, kernel))
            layer.py_kernels[key] = shapes
        if layer in unrolled:
            decomposition_table[layer] = shapes
        layer._dispatch_cache.clear()
    try:
        yield
    finally:
        for layer, function in unrolled.items():
            decomposition_table[layer] = function
        for layer, key, kernel in kernels:
            layer.py_kernels[key] = kernel
            layer._dispatch_cache.clear()


def need_fixed_steps(program: ExportedProgram, runtime: str) -> None:
    """Raise DeployError if a recurrent layer has a free number of steps, for compilers that unroll it.

    They would unroll as many steps as the example has, and compute something else for other lengths.
    """
    for node in program.graph.nodes:
        if node.target not in LAYERS:
            continue
        value, batch_first = node.args[0].meta["val"], bool(node.args[8])
        if not str(value.shape[1 if batch_first else 0]).isdigit():
            raise DeployError(
                f"runtime {runtime!r} unrolls recurrent layers, so that their number of steps must be fixed; use "
                "'onnxruntime', 'openvino' or 'eager' for series of any length"
            )


def _lstm(x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    hidden, cell = states
    return _sequence(x, hidden, *options), torch.empty_like(hidden), torch.empty_like(cell)


def _single(x: Tensor, hidden: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    return _sequence(x, hidden, *options), torch.empty_like(hidden)


def _sequence(
    x: Tensor,
    hidden: Tensor,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Tensor:
    """Outputs of all steps: (steps, batch, features) or (batch, steps, features), for two directions side by side."""
    return x.new_empty((x.shape[0], x.shape[1], hidden.shape[2] * (2 if bidirectional else 1)))
