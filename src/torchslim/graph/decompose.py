"""Decomposition of attention, einsum and SiLU into products, for runtimes that compute products better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from torchslim.graph.rewrite import graft

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
EINSUM = aten.einsum.default
SILU = (aten.silu.default, aten.silu_.default)


def open_products(model: GraphModule, wanted: Callable[[Node], bool], *, guard: bool = False) -> None:
    """Rewrite attention and einsum nodes for which `wanted` returns True as matrix products.

    A SiLU becomes the product of its input and the sigmoid of the input. Results stay the same up to rounding; without
    `guard` a query whose mask allows no key attends to every key.
    """
    opened = False
    for node in list(model.graph.nodes):
        if node.op != "call_function" or node.target not in (ATTENTION, EINSUM, *SILU) or not wanted(node):
            continue
        if node.target in SILU:
            function, inputs = _silu, node.args[:1]
        elif node.target is ATTENTION:
            function, inputs = attention(*_sizes(node), **_options(node), guard=guard), node.args[:4]
        else:
            function, inputs = _sum(node), node.args[1]
        splice(model, node, function, [input_ for input_ in inputs if isinstance(input_, Node)])
        opened = True
    for node in model.graph.nodes if opened else ():
        if node.target is aten.view.default:  # the products may lie in memory in another order
            node.target = aten.reshape.default
    model.graph.eliminate_dead_code()
    model.recompile()


def attention(
    width: int, *, causal: bool = False, scale: float | None = None, groups: bool = False, guard: bool = False
) -> Callable[..., Tensor]:
    """Return a function that computes `scaled_dot_product_attention` as two products and a softmax.

    Args:
        width: size of a head.
        causal: a query sees the keys up to its own position.
        scale: factor of the scores; None means 1 / sqrt(width).
        groups: allow fewer heads of keys than of queries.
        guard: the result of a query whose mask allows no key is 0, as in torch; else the query attends to every key.

    Shapes of the function: (..., queries, width), (..., keys, width), (..., keys, values) and a mask that broadcasts to
    (..., queries, keys) -> (..., queries, values).
    """
    factor = 1 / math.sqrt(width) if scale is None else scale

    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if groups and key.shape[-3] != query.shape[-3]:
            key, value = (tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3) for tensor in (key, value))
        scores = torch.matmul(query, key.transpose(-2, -1)) * factor
        lowest = torch.finfo(scores.dtype).min
        if causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if mask is not None:
            # the lowest finite number, not -inf: the softmax of a row of infinities is NaN
            scores = torch.where(mask, scores, lowest) if mask.dtype == torch.bool else (scores + mask).clamp(lowest)
        mixed = torch.matmul(torch.softmax(scores, -1), value)
        if mask is None or not guard:
            return mixed
        seen = mask if mask.dtype == torch.bool else mask > -torch.inf
        return mixed * seen.any(-1, keepdim=True).to(mixed.dtype)

    return compute


def _sizes(node: Node) -> tuple[int]:
    query = node.args[0]
    assert isinstance(query, Node)
    return (int(query.meta["val"].shape[-1]),)


def _options(node: Node) -> dict[str, Any]:
    arguments = {**dict(zip(("is_causal",), node.args[5:6], strict=False)), **node.kwargs}
    return {
        "causal": bool(arguments.get("is_causal", False)),
        "scale": arguments.get("scale"),
        "groups": bool(arguments.get("enable_gqa", False)),
    }


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _sum(node: Node) -> Callable[..., Tensor]:
    equation = str(node.args[0])
    return lambda *tensors: torch.einsum(equation, *tensors)


def splice(
    model: GraphModule,
    node: Node,
    function: Callable[..., Tensor],
    inputs: Sequence[Node],
    *,
    owner: Node | None = None,
) -> None:
    """Replace `node` by the operations of `function` on `inputs`, as part of the node's layer or the owner's."""
    values = [input_.meta["val"] for input_ in inputs]
    mode = next(tensor.fake_mode for tensor in values if hasattr(tensor, "fake_mode"))

    def positional(*tensors: Tensor) -> Tensor:  # the tracer would also count arguments with a default
        return function(*tensors)

    with mode:  # einsum would stay one operation if it were traced before dispatch
        traced = make_fx(positional, tracing_mode="symbolic", pre_dispatch=node.target is ATTENTION)(*values)
    for name, value in [*traced.named_buffers(), *traced.named_parameters()]:
        raise AssertionError(f"{name} {tuple(value.shape)}: a spliced graph must store no tensors")
    result = graft(model.graph, traced.graph, inputs, node, owner or node)
    assert isinstance(result, Node)
    node.replace_all_uses_with(result)
    model.graph.erase_node(node)
