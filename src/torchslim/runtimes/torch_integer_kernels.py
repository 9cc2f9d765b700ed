"""Puts PyTorch's own integer kernels for dynamic linear layers, LSTMs and GRUs into a program before it runs.

These kernels (`quantized::linear_with_input_q_dq_qweight_dq_output_fp32`, `aten::quantized_lstm`,
`aten::quantized_gru`) belong to the deprecated `torch.ao.quantization`, but nothing in eager PyTorch is as fast for
recurrent networks. Only this file uses them. Where they are missing, the graph runs unchanged: correct, but slower. A
test fails once PyTorch drops them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from torchslim.core.hardware import saturates
from torchslim.graph.integer_patterns import (
    Int8Weight,
    Linear,
    Recurrent,
    find_int8,
    find_linear,
    find_recurrent,
    int4_weights,
)
from torchslim.graph.rewrite import strip_unused
from torchslim.graph.row_ranges import LEVELS, ZERO_POINT, row_magnitudes

ENGINES = ("x86", "fbgemm")  # other engines take other weights, and are not tested


def missing() -> list[str]:
    """Names of the kernels that this PyTorch or processor lacks; empty if it has all."""
    required = {
        "quantized": (
            "linear_prepack",
            "linear_with_input_q_dq_qweight_dq_output_fp32",
            "make_quantized_cell_params_dynamic",
        ),
        "aten": ("quantized_lstm", "quantized_gru"),
    }
    absent = [
        f"{space}::{name}"
        for space, names in required.items()
        for name in names
        if not hasattr(getattr(torch.ops, space), name)
    ]
    if not hasattr(torch, "_make_per_channel_quantized_tensor"):
        absent.append("tensors of dtype qint8")
    if torch.backends.quantized.engine not in ENGINES:
        absent.append(f"torch.backends.quantized.engine {' or '.join(ENGINES)}")
    return absent


def lower(module: GraphModule) -> GraphModule:
    """Insert integer kernels into a program's module, and dequantize once the weights that no kernel reads.

    Changes the module in place. Its outputs differ from the graph's only by rounding.
    """
    stored: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def constant(node: Node) -> Tensor | None:
        return stored.get(str(node.target)) if node.op == "get_attr" else None

    graph, integer = module.graph, not missing()
    for node in list(graph.nodes):
        linear, recurrent = find_linear(node, constant), find_recurrent(node, constant)
        kernel: nn.Module | None = None
        if integer and linear is not None and linear.source is not None and _is_float(linear.source):
            bias = None if linear.bias is None else constant(linear.bias)
            if isinstance(linear.weight, Int8Weight) and (bias is None) == (linear.bias is None):
                kernel, arguments = DynamicLinear(linear, bias), [linear.source]
        elif integer and recurrent is not None and recurrent.source is not None and _is_float(recurrent.source):
            kernel, arguments = DynamicRecurrent(recurrent), [recurrent.source, *recurrent.states]
        if kernel is not None:
            name = _free(module, "integer_kernel")
            module.add_submodule(name, kernel)
            with graph.inserting_before(node):
                call = graph.call_module(name, tuple(arguments))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)  # dead code elimination would keep it: it may draw random numbers in training
    graph.eliminate_dead_code()
    int8_weights = {node: find_int8(node, constant) for node in graph.nodes}
    for node, weight in (*int8_weights.items(), *int4_weights(graph, constant).items()):
        if weight is not None:
            name = _free(module, "float_weight")
            module.register_buffer(name, weight.dequantized(), persistent=False)
            with graph.inserting_before(node):
                floats = graph.get_attr(name)
            floats.meta["val"] = node.meta.get("val")
            node.replace_all_uses_with(floats)
    graph.eliminate_dead_code()
    strip_unused(module)
    module.recompile()
    return module


class DynamicLinear(nn.Module):
    """A linear layer on packed weights that rounds every row of its input with a range of its own.

    `quantized::linear_dynamic` would round the whole input with one range. This kernel takes a constant scale, and the
    rows over their largest magnitudes.
    """

    def __init__(self, layer: Linear, bias: Tensor | None) -> None:
        super().__init__()
        assert isinstance(layer.weight, Int8Weight)
        self.packed = _packed(layer.weight, None)
        self.bias = None if bias is None else bias.detach().float()
        self.grid = (1 / 63, 64) if _must_reduce(layer.weight) else (1 / LEVELS, ZERO_POINT)

    def forward(self, x: Tensor) -> Tensor:
        magnitudes = row_magnitudes(x)
        kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        product: Tensor = kernel(x / magnitudes, *self.grid, self.packed)
        return product * magnitudes if self.bias is None else torch.addcmul(self.bias, product, magnitudes)


class DynamicRecurrent(nn.Module):
    """`aten::quantized_lstm` or `aten::quantized_gru` on packed weights."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.layer_of = (True, layer.layers, 0.0, False, layer.bidirectional, layer.batch_first)
        self.kind = layer.kind
        self.cells = []
        for input_weight, hidden_weight, input_bias, hidden_bias in layer.cells:
            # the kernel adds the biases that the cells hold, whatever `has_biases` says
            zeros = torch.zeros(input_weight.values.shape[0])
            biases = [(zeros if bias is None else bias).detach() for bias in (input_bias, hidden_bias)]
            weights = [_packed(input_weight, biases[0]), _packed(hidden_weight, biases[1])]
            reduce_range = _must_reduce(input_weight) or _must_reduce(hidden_weight)
            make = torch.ops.quantized.make_quantized_cell_params_dynamic
            self.cells.append(make(*weights, *biases, reduce_range))

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        if self.kind == "GRU":
            return torch.ops.aten.quantized_gru.input(x, states[0], self.cells, *self.layer_of)
        return torch.ops.aten.quantized_lstm.input(
            x, list(states), self.cells, *self.layer_of, dtype=torch.qint8, use_dynamic=True
        )


def _packed(weight: Int8Weight, bias: Tensor | None) -> Any:
    scale = weight.scale.detach().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they announce the end of such tensors: see above
        quantized = torch._make_per_channel_quantized_tensor(
            weight.values, scale, torch.zeros(scale.shape, dtype=torch.int64), weight.axis
        )
    return torch.ops.quantized.linear_prepack(quantized, None if bias is None else bias.detach().float())


def _must_reduce(weight: Int8Weight) -> bool:
    """Whether activations must be 7-bit, so that sums of two products fit into 16 bits on this processor."""
    return saturates() and int(weight.values.abs().max()) > 64


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _free(module: nn.Module, name: str) -> str:
    number = 0
    while hasattr(module, f"{name}_{number}"):
        number += 1
    return f"{name}_{number}"
