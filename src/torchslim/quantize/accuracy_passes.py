"""Rounding of weights and correction of biases in a prepared graph, each an option of `Helpers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchslim.graph.export import layer_of
from torchslim.quantize.accuracy_options import Helpers, Rounding
from torchslim.quantize.aten_ops import Weighted, along, argument, behind, set_tensor, tensor_of, weighted
from torchslim.quantize.equalize import correct_biases, watch
from torchslim.quantize.fake_quantize import GroupWeights
from torchslim.quantize.weight_only import quantize_groups
from torchslim.quantize.weight_rounding import adaround, columns, gptq

POSITIONS = 1024  # of a batch that enter a layer's second moments, at most
LARGEST = 2**26  # elements of second moments in memory at once


def after_observing(model: GraphModule, runs: Sequence[Any], helpers: Helpers) -> list[str]:
    """Round weights and correct biases of a prepared, calibrated graph; returns the paths of the changed layers."""
    changed: list[str] = []
    before = {node: _weight(model, node) for node in model.graph.nodes if _roundable(model, node)}
    if helpers.rounding != "nearest":
        changed += round_weights(model, runs, helpers.rounding)
    if helpers.correct_biases:
        changed += correct_biases(model, runs, lambda read, weight: grid_of(model, read, weight), before)
    return list(dict.fromkeys(changed))


def grid_of(model: GraphModule, read: Node, weight: Tensor) -> Tensor | None:
    """`weight` as it will be stored, on the grid of its observer `read`; None where it stays in float."""
    if read.op != "call_module":
        return None
    observer: Any = model.get_submodule(str(read.target))
    if isinstance(observer, GroupWeights):
        return observer.rounded(weight)
    low, high, axis = observer.quant_min, observer.quant_max, observer.ch_axis
    scale = along(observer.calculate_qparams()[0].to(weight.dtype), weight, axis)
    return (weight / scale).round().clamp(low, high) * scale


def round_weights(model: GraphModule, runs: Sequence[Any], method: Rounding) -> list[str]:
    """Round the weights of every layer, from the second moments of its input; returns the paths of the layers.

    The rounded values replace the weights, so that rounding to nearest keeps them. Layers are rounded in parts whose
    moments fit in memory; every part takes one run over the calibration data.
    """
    layers = [node for node in model.graph.nodes if _roundable(model, node)]
    paths: list[str] = []
    while layers:
        part: list[Node] = []
        elements = 0
        while layers and (not part or elements + _elements(model, layers[0]) <= LARGEST):
            elements += _elements(model, layers[0])
            part.append(layers.pop(0))
        moments = second_moments(model, part, runs)
        for node in part:
            _round(model, node, moments[node], method)
            paths.append(layer_of(node))
    model.recompile()
    return paths


def second_moments(model: GraphModule, layers: Sequence[Node], runs: Sequence[Any]) -> dict[Node, Tensor]:
    """Sums of x x^T per layer, x the inputs of a row of its weight: (groups, inputs, inputs), in float64."""
    readers: dict[Node, list[Node]] = {}
    for node in layers:
        source = argument(node, _layer(node).source)
        assert source is not None
        readers.setdefault(source, []).append(node)
    moments: dict[Node, Tensor] = {}

    def see(source: Node, value: Tensor) -> None:
        for node in readers[source]:
            rows = columns(node, _layer(node), value.detach().float(), tuple(_weight(model, node).shape[2:]))
            step = -(-rows.shape[1] // POSITIONS)
            rows = rows[:, ::step].double()
            moment = rows.transpose(1, 2) @ rows
            moments[node] = moments[node] + moment if node in moments else moment

    watch(model, readers, see, runs)
    return moments


def _round(model: GraphModule, node: Node, moments: Tensor, method: Rounding) -> None:
    layer = _layer(node)
    weight_input = argument(node, layer.weight)
    stored = behind(weight_input)
    assert weight_input is not None
    assert stored is not None
    observer: Any = model.get_submodule(str(weight_input.target))
    weight = tensor_of(model, stored).detach()
    rows = weight.transpose(0, layer.axis) if layer.axis else weight
    matrix = rows.flatten(1)
    grouped = isinstance(observer, GroupWeights)
    if grouped:
        scales = quantize_groups(rows, group_size=observer.group_size)[1]
        steps = scales.repeat_interleave(observer.group_size, 1)[:, : matrix.shape[1]]
    else:
        scales = observer.calculate_qparams()[0]
        steps = scales.view(-1, 1).expand_as(matrix)
    low, high = observer.quant_min, observer.quant_max
    choose = gptq if method == "gptq" else adaround
    parts = len(moments)
    pieces = zip(matrix.chunk(parts), steps.chunk(parts), moments, strict=True)
    integers = torch.cat([choose(piece, step, moment, low, high) for piece, step, moment in pieces])
    if grouped:
        observer.chosen = (integers.to(torch.int8), scales)
    values = (integers * steps).to(weight.dtype).reshape(rows.shape)
    set_tensor(model, stored, values.transpose(0, layer.axis).contiguous() if layer.axis else values)


def _roundable(model: GraphModule, node: Node) -> bool:
    """Whether `node` is a layer with a stored weight that will be integers and whose rows multiply its input."""
    layer = weighted(node)
    weight_input = argument(node, layer.weight) if layer is not None else None
    if layer is None or weight_input is None or weight_input.op != "call_module" or "transpose" in layer.kind:
        return False
    return behind(weight_input) is not None and argument(node, layer.source) is not None


def _elements(model: GraphModule, node: Node) -> int:
    layer, weight = _layer(node), _weight(model, node)
    inputs = weight[0].numel() if layer.axis == 0 else weight.shape[0]
    groups = 1 if layer.kind == "linear" else int(node.args[6] if len(node.args) > 6 else 1)  # type: ignore[arg-type]
    return groups * inputs**2


def _layer(node: Node) -> Weighted:
    layer = weighted(node)
    assert layer is not None
    return layer


def _weight(model: GraphModule, node: Node) -> Tensor:
    stored = behind(argument(node, _layer(node).weight))
    assert stored is not None
    return tensor_of(model, stored)
