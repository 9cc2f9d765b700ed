"""Graphs as the quantizer makes them, made by a quantizer of a few lines: what runtimes lower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import PerChannelMinMaxObserver, PlaceholderObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from torchslim.graph.export import Captured, capture
from torchslim.graph.io_structure import flatten
from torchslim.graph.rewrite import strip_unused
from torchslim.graph.row_ranges import rows_in_place_of_tensors
from torchslim.quantize.schemes import weight_range
from torchslim.quantize.weight_only import emit, quantize_groups

aten = torch.ops.aten
ACTIVATION = QuantizationSpec(
    dtype=torch.uint8,
    observer_or_fake_quant_ctr=PlaceholderObserver.with_args(eps=1e-7),
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    is_dynamic=True,
)
RECURRENT = (aten.lstm.input, aten.gru.input)


def weight_spec() -> QuantizationSpec:
    """Symmetric int8 per output channel, in the range of the processor that is detected now."""
    low, high = weight_range("onnxruntime")
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=1e-20),
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


class Simple(Quantizer):
    """Int8 weights for linear, recurrent and convolution layers; dynamic inputs for those in `dynamic`."""

    def __init__(self, dynamic: tuple[Any, ...]) -> None:
        super().__init__()
        self.dynamic = dynamic

    def annotate(self, model: GraphModule) -> GraphModule:
        weight = weight_spec()
        for node in model.graph.nodes:
            if node.target in RECURRENT:
                weights = [each for each in node.args[2] if each.meta["val"].dim() == 2]
            elif node.target in (aten.linear.default, aten.conv2d.default, aten.conv_transpose2d.input):
                weights = [node.args[1]]
            else:
                continue
            inputs = dict.fromkeys(weights, weight)
            if node.target in self.dynamic:
                inputs[node.args[0]] = ACTIVATION
            node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
        return model

    def validate(self, model: GraphModule) -> None: ...


def int8_graph(model: nn.Module, inputs: tuple[Tensor, ...], *, dynamic: bool) -> GraphModule:
    """A graph with int8 weights, linear and recurrent layers dynamic or not."""
    captured = capture(model.eval(), inputs)
    prepared = prepare_pt2e(captured.program.module(), Simple((aten.linear.default, *RECURRENT) if dynamic else ()))
    with torch.no_grad():
        prepared(*_flat(captured))
        converted = convert_pt2e(prepared)
    rows_in_place_of_tensors(converted)
    strip_unused(converted)
    return converted


def int4_graph(model: nn.Module, inputs: tuple[Tensor, ...], *, group_size: int = 32) -> GraphModule:
    """A graph with all weights of two and more dimensions in 4 bits."""
    module = capture(model.eval(), inputs).program.module()
    parameters = dict(module.named_parameters())
    for node in list(module.graph.nodes):
        weight = parameters.get(str(node.target)) if node.op == "get_attr" else None
        if weight is not None and weight.dim() >= 2:
            emit(module, node, *quantize_groups(weight, group_size=group_size), group_size=group_size)
    strip_unused(module)
    return module


def _flat(captured: Captured) -> list[Tensor]:
    return flatten(captured.inputs, captured.example)


def stored_bits(module: nn.Module) -> int:
    """The bits of all tensors that the graph reads."""
    return sum(8 * each.numel() * each.element_size() for each in module.state_dict().values())
