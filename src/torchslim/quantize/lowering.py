"""Changes to a graph at its conversion: biases that fit integer kernels, packed groups, integer embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchslim.graph.export import layer_of
from torchslim.quantize.aten_ops import (
    EMBEDDINGS,
    add_tensor,
    argument,
    aten,
    is_constant,
    tensor_of,
    weighted,
)
from torchslim.quantize.fake_quantize import GroupWeights
from torchslim.quantize.weight_only import emit

quantized = torch.ops.quantized_decomposed


def observed_layers(model: GraphModule) -> dict[str, str]:
    """Paths of the layers whose values the observers of a prepared graph see, by the observers' names."""
    return {
        str(node.target): layer_of(node.args[0])
        for node in model.graph.nodes
        if node.op == "call_module" and node.args and isinstance(node.args[0], Node)
    }


def observe_weights(model: GraphModule) -> None:
    """Show every weight to its observer; a weight may be computed from stored tensors."""
    for node in model.graph.nodes:
        if node.op == "call_module" and is_constant(node):
            constant_of(model, node)


def constant_of(model: GraphModule, node: Node) -> Any:
    """The value of a node that is computed from stored tensors alone."""
    if node.op == "get_attr":
        return tensor_of(model, node).detach()
    call: Any = model.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    def value_of(argument: Node) -> Any:
        return constant_of(model, argument)

    return call(*map_arg(node.args, value_of), **map_arg(node.kwargs, value_of))


def fit_biases(model: GraphModule) -> None:
    """Widen the weight range of channels whose bias would not fit 32 bits at the scale of their products.

    Integer kernels add the bias as a multiple of input scale times weight scale. A channel of zeros (pruned, or dead in
    its batch norm) has a weight scale of almost 0, and its bias would be clipped. The wider range costs such weights
    less than one step of an 8-bit output. Half of the 32 bits' range is left for the sum of the products.
    """
    for node in model.graph.nodes:
        if (layer := weighted(node)) is None:
            continue
        inputs, weights, bias = (argument(node, index) for index in (layer.source, layer.weight, layer.bias))
        if bias is None or bias.op != "get_attr" or inputs is None or weights is None:
            continue
        if inputs.op != "call_module" or weights.op != "call_module":
            continue
        observer: Any = model.get_submodule(str(weights.target))
        source: Any = model.get_submodule(str(inputs.target))
        observer = getattr(observer, "activation_post_process", observer)
        if getattr(source, "is_dynamic", False) or not hasattr(observer, "max_val"):
            continue
        scale, _ = source.calculate_qparams()
        smallest = tensor_of(model, bias).detach().abs().double() / (scale.double() * 2**30)
        reach = (smallest * (observer.quant_max - observer.quant_min) / 2).to(observer.max_val.dtype)
        if reach.shape == observer.max_val.shape:
            observer.max_val.copy_(torch.maximum(observer.max_val, reach))


def store_groups(model: GraphModule) -> None:
    """Store the weights that have a scale for each group as integers, several to a byte."""
    for node in list(model.graph.nodes):
        if node.op != "call_module":
            continue
        module = model.get_submodule(str(node.target))
        source = argument(node, 0)
        if not isinstance(module, GroupWeights) or source is None:
            continue
        weight = constant_of(model, source)
        rows = weight.transpose(0, module.ch_axis).contiguous()
        float_rows = add_tensor(model, node, f"_{source.name}_rows", rows)
        float_rows.meta |= {key: value for key, value in node.meta.items() if key == "nn_module_stack"}
        replacement = float_rows
        if module.ch_axis:
            with model.graph.inserting_before(node):
                replacement = model.graph.call_function(aten.transpose.int, (float_rows, 0, module.ch_axis))
        node.replace_all_uses_with(replacement)
        replacement.meta["val"] = weight
        model.graph.erase_node(node)
        emit(model, float_rows, *module.stored(weight), group_size=module.group_size)
    model.graph.eliminate_dead_code()
    model.recompile()


def gather_first(model: GraphModule) -> None:
    """Dequantize only the rows that an integer embedding looks up, not the whole table at each call."""
    for node in list(model.graph.nodes):
        table = argument(node, 0) if node.target in EMBEDDINGS else None
        if table is None or table.target is not quantized.dequantize_per_channel.default or table.args[3] != 0:
            continue
        integers, scales = table.args[0], table.args[1]
        with model.graph.inserting_before(node):
            rows = model.graph.call_function(aten.embedding.default, (integers, node.args[1]))
            steps = model.graph.call_function(aten.unsqueeze.default, (scales, 1))
            step = model.graph.call_function(aten.embedding.default, (steps, node.args[1]))
            values = model.graph.call_function(aten.to.dtype, (rows, torch.float32))
            product = model.graph.call_function(aten.mul.Tensor, (values, step))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        model.graph.erase_node(node)
