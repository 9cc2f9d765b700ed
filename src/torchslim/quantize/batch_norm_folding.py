"""Batch norms: folded into the layer before them, or kept separate in training and folded afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchslim.quantize.aten_ops import (
    BATCH_NORMS,
    DROPOUTS,
    add_tensor,
    along,
    argument,
    aten,
    batch_norm,
    behind,
    set_tensor,
    shape_of,
    tensor_of,
    weighted,
)


def fold_batch_norms(model: GraphModule) -> None:
    """Fold each batch norm into the layer before it, where nothing else reads the layer's output or weight.

    With s = gamma / sqrt(variance + eps), the layer gets weight * s and (bias - mean) * s + beta (Jacob 2018,
    arXiv:1712.05877, eq. 14). The range of an observed weight is multiplied by |s|, channel by channel, which leaves
    the integers as they were (their sign follows that of s).
    """
    for norm in list(model.graph.nodes):
        if norm.target not in BATCH_NORMS:
            continue
        layer = argument(norm, 0)
        if layer is not None and _foldable(layer, norm):
            _fold(model, layer, norm)
    model.graph.eliminate_dead_code()
    model.recompile()


def hide_batch_norms(model: GraphModule) -> None:
    """Rename the batch norms that `fold_batch_norms` left, so that libraries do not fold them."""
    _rename(model, BATCH_NORMS[0], batch_norm)


def show_batch_norms(model: GraphModule) -> None:
    """Undo `hide_batch_norms`."""
    _rename(model, batch_norm, BATCH_NORMS[0])


def switch(model: GraphModule) -> None:
    """Add the inputs `dropping` and `norming` to the graph, the training mode of its dropouts and batch norms."""
    last = [node for node in model.graph.nodes if node.op == "placeholder"][-1]
    with model.graph.inserting_after(last):
        dropping = model.graph.placeholder("dropping")
    with model.graph.inserting_after(dropping):
        norming = model.graph.placeholder("norming")
    for node in model.graph.nodes:
        if node.target in BATCH_NORMS:
            node.update_arg(5, norming)
        elif node.target in DROPOUTS:
            node.update_arg(2, dropping)


def settle(model: GraphModule) -> None:
    """Undo `switch`: remove both inputs and fix dropouts and batch norms in evaluation mode."""
    for node in list(model.graph.nodes):
        if node.op == "placeholder" and node.name in ("dropping", "norming"):
            for user in list(node.users):
                user.args = tuple(False if value is node else value for value in user.args)
            model.graph.erase_node(node)


def _rename(model: GraphModule, old: Any, new: Any) -> None:
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target is old:
            node.target = new


def _foldable(layer: Node, norm: Node) -> bool:
    layout = weighted(layer)
    if layout is None or len(layer.users) != 1 or not isinstance(norm.args[5], (bool, Node)) or norm.args[5] is True:
        return False
    weight, bias = behind(argument(layer, layout.weight)), argument(layer, layout.bias)
    if weight is None or len(weight.users) != 1:
        return False
    if any(isinstance(node, Node) and node.op != "get_attr" for node in (bias, *norm.args[1:5])):
        return False
    if norm.args[3] is None or norm.args[4] is None:  # no running statistics: it uses those of each batch
        return False
    if layout.kind == "linear":  # a batch norm's channels are dimension 1
        return len(shape_of(layer)) == 2
    grouped = layout.kind.startswith("conv_transpose") and shape_of(weight)[1] != _channels(norm)
    return not grouped


def _channels(norm: Node) -> int | None:
    shape = shape_of(norm)
    return int(shape[1]) if len(shape) > 1 else None


def _fold(model: GraphModule, layer: Node, norm: Node) -> None:
    layout = weighted(layer)
    assert layout is not None
    weight_input, bias = argument(layer, layout.weight), argument(layer, layout.bias)
    weight = behind(weight_input)
    assert weight_input is not None
    assert weight is not None
    gamma, beta, mean, variance = (
        tensor_of(model, node).detach() if isinstance(node, Node) else None for node in norm.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    value = tensor_of(model, weight).detach()
    eps = float(norm.args[7])  # type: ignore[arg-type]
    scale = torch.rsqrt(variance.double() + eps) * (1.0 if gamma is None else gamma.double())
    shift = -mean.double() * scale + (0.0 if beta is None else beta.double())
    if bias is not None:
        shift = shift + tensor_of(model, bias).detach().double() * scale
    set_tensor(model, weight, (value.double() * along(scale, value, layout.axis)).to(value.dtype))
    if weight_input.op == "call_module":
        _scale_range(model.get_submodule(str(weight_input.target)), scale)
    new_bias = add_tensor(model, layer, f"_{layer.name}_bias", shift.to(value.dtype))
    assert layout.bias is not None or layer.target in (aten.mm.default, aten.matmul.default)
    if layout.bias is not None:
        while len(layer.args) <= layout.bias:
            layer.args = (*layer.args, None)
        layer.update_arg(layout.bias, new_bias)
    else:  # the operation has no argument for a bias
        with model.graph.inserting_after(layer):
            total = model.graph.call_function(aten.add.Tensor, (layer, new_bias))
        total.meta = dict(layer.meta)
        norm.replace_all_uses_with(total)
        model.graph.erase_node(norm)
        return
    norm.replace_all_uses_with(layer)
    model.graph.erase_node(norm)


def _scale_range(observer: Any, scale: Tensor) -> None:
    """Multiply the range that a weight's observer has seen by `scale`, channel by channel."""
    observer = getattr(observer, "activation_post_process", observer)
    if getattr(observer, "min_val", None) is not None and observer.min_val.numel() == scale.numel():
        low, high = observer.min_val.double() * scale, observer.max_val.double() * scale
        observer.min_val.copy_(torch.minimum(low, high))
        observer.max_val.copy_(torch.maximum(low, high))
    elif getattr(observer, "scale", None) is not None and len(observer.scale) == scale.numel():
        factor = scale.abs().to(observer.scale.dtype)  # steps per channel, or per group of a channel
        observer.scale.data.mul_(factor.view(-1, *[1] * (observer.scale.dim() - 1)))
