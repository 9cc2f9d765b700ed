"""Our quantizer: marks the ATen nodes of an exported graph that compute on integers.

It looks at operations, not at module classes, so subclasses of Conv2d and functional calls are seen. ONNX Runtime
fuses a convolution only when its input, weight and output all carry Q/DQ pairs, and an addition only when both
inputs and the output do; a following relu or relu6 moves the output's pair behind itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from torchslim.export import WRAPPED
from torchslim.quantize.schemes import Scheme
from torchslim.steps import LayerRecord

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
LINEARS = (aten.linear.default,)
POOLS = (aten.max_pool2d.default,)
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
ACTIVATIONS = (aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default)
SMALLEST_SCALE = 1e-20  # the usual 1e-7 turns networks with tiny activations into zeros
ANNOTATION = "quantization_annotation"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what the quantize operations take


class SlimQuantizer(Quantizer):
    """Annotates conv2d, linear, residual additions and the max pools between them, with a relu or relu6 fused.

    Args:
        scheme: bits of weights and activations.
        weight_range: the integers that a weight may take.
    """

    def __init__(self, scheme: Scheme, weight_range: tuple[int, int]) -> None:
        self.activation = QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=SMALLEST_SCALE),
            quant_min=0,
            quant_max=2**scheme.activation_bits - 1,
            qscheme=torch.per_tensor_affine,
        )
        low, high = weight_range
        self.weight = QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=SMALLEST_SCALE),
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )
        self.scheme = scheme
        self.records: list[LayerRecord] = []

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark what is quantized, and record what is not and why."""
        self.records = []
        for node in model.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in (*CONVOLUTIONS, *LINEARS):
                self._weighted(node)
            elif node.target in ADDITIONS and _residual(node):
                self._mark(node, dict.fromkeys(node.args[:2], self.activation))
            elif node.target in POOLS and ANNOTATION in node.args[0].meta:
                # runtimes pool on integers and take it for granted that scale and zero point stay the same
                source = node.args[0]
                node.meta[ANNOTATION] = QuantizationAnnotation(
                    input_qspec_map={source: self.activation},
                    output_qspec=SharedQuantizationSpec((source, node)),
                    _annotated=True,
                )
            elif any(_is_weight(source) for source in node.all_input_nodes):
                self._refuse(node, f"{_name(node)} has no integer kernel in this scheme")
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: every annotation is one that the runtimes take."""

    def _weighted(self, node: Node) -> None:
        source, weight = node.args[:2]
        if not isinstance(source, Node) or not isinstance(weight, Node) or weight.op != "get_attr":
            self._refuse(node, "its weight is computed, not stored")
            return
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype not in FLOATS:
            self._refuse(node, f"it computes in {value.dtype}; convert the model with .float()")
            return
        # a linear layer that ends the network can answer in float at no cost, and keeps its logits exact
        ends = node.target in LINEARS and any(user.op == "output" for user in node.users)
        self._mark(node, {source: self.activation, weight: self.weight}, output=not ends)
        self.records.append(
            LayerRecord(
                layer=layer_of(node),
                action="quantized",
                weight_bits=self.scheme.weight_bits,
                activation_bits=self.scheme.activation_bits,
            )
        )

    def _mark(self, node: Node, inputs: dict[Any, QuantizationSpec], *, output: bool = True) -> None:
        last = _fused_activation(node) or node
        spec = self.activation if output else None
        node.meta[ANNOTATION] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=spec if last is node else None, _annotated=True
        )
        if last is not node:
            last.meta[ANNOTATION] = QuantizationAnnotation(output_qspec=spec, _annotated=True)

    def _refuse(self, node: Node, reason: str) -> None:
        self.records.append(LayerRecord(layer=layer_of(node), action="refused", reason=reason))


def layer_of(node: Node) -> str:
    """The path of the module that a node belongs to; the node's name where it belongs to none."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values())) if entry[0]), "")
    return f"{path}.".removeprefix("L['self'].").removeprefix(WRAPPED).removesuffix(".") or node.name


def _fused_activation(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in ACTIVATIONS else None


def _residual(node: Node) -> bool:
    """An addition of two tensors of one shape, at least one of them a convolution's output.

    Elsewhere (the residual stream of a transformer) eight bits lose too much: 28 dB became 7 on DeiT-tiny.
    """
    left, right = node.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node) or node.kwargs.get("alpha", 1) != 1:
        return False
    shapes = [getattr(each.meta.get("val"), "shape", None) for each in (left, right)]
    return shapes[0] is not None and shapes[0] == shapes[1] and any(_ends_convolution(each) for each in (left, right))


def _ends_convolution(node: Node) -> bool:
    while node.target in (*ACTIVATIONS, aten.batch_norm.default, aten.dropout.default):
        node = node.args[0]  # type: ignore[assignment]
    return node.target in CONVOLUTIONS or (node.target in ADDITIONS and ANNOTATION in node.meta)


def _is_weight(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "get_attr" and isinstance(value, torch.Tensor) and value.dim() >= 2 and value.is_floating_point()


def _name(node: Node) -> str:
    return str(node.target).removesuffix(".default")


def observed_layers(model: GraphModule) -> dict[str, str]:
    """For each observer of a prepared graph, by its name, the layer whose value it sees."""
    return {
        str(node.target): layer_of(node.args[0])
        for node in model.graph.nodes
        if node.op == "call_module" and node.args and isinstance(node.args[0], Node)
    }


def fit_biases(model: GraphModule) -> None:
    """Widen the weight range of channels whose bias would not fit 32 bits at the scale of their products.

    Integer kernels add the bias as a multiple of input scale times weight scale. A channel of zeros (pruned, or dead in
    its batch norm) has next to no weight scale, and its bias would be cut off. What such weights lose is below one step
    of an 8-bit output. Half of the 32 bits' range is left to the sum of the products.
    """
    for node in model.graph.nodes:
        if ANNOTATION not in node.meta or node.target not in (*CONVOLUTIONS, *LINEARS):
            continue
        inputs, weights, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
        if bias is None or any(each.op != "call_module" for each in (inputs, weights)) or bias.op != "get_attr":
            continue
        observer = getattr(model, str(weights.target))
        scale, _ = getattr(model, str(inputs.target)).calculate_qparams()
        value = attrgetter(str(bias.target))(model)
        smallest = value.detach().abs().double() / (scale.double() * 2**30)
        reach = (smallest * (observer.quant_max - observer.quant_min) / 2).to(observer.max_val.dtype)
        observer.max_val.copy_(torch.maximum(observer.max_val, reach))


def strip_unused(model: GraphModule) -> None:
    """Delete parameters, buffers and submodules that the graph no longer uses: the float copies of its weights."""
    model.delete_all_unused_submodules()
    used = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    stored: Sequence[str] = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    for name in stored:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(owner), attribute)
