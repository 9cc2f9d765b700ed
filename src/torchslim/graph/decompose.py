"""Attention and SiLU taken apart into the products they are made of, for runtimes that compute these better."""

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
    """Write scaled dot products and sums of products as matrix products, for the nodes that are `wanted`.

    A SiLU becomes the product of its input and the sigmoid of it. What they compute stays the same but for rounding;
    without `guard` a query that may look at no key at all attends to every key.
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
        if node.target is aten.view.default:  # what is written as products may lie in memory in another order
            node.target = aten.reshape.default
    model.graph.eliminate_dead_code()
    model.recompile()


def attention(
    width: int, *, causal: bool = False, scale: float | None = None, groups: bool = False, guard: bool = False
) -> Callable[..., Tensor]:
    """`torch.nn.functional.scaled_dot_product_attention` as two products and a softmax.

    Args:
        width: the size of a head.
        causal: a query sees the keys up to its own place.
        scale: of the scores; None: 1 / sqrt(width).
        groups: there may be fewer keys' heads than queries'.
        guard: what a query gets that may look at no key is 0, as torch has it; else it attends to every key.

    Shapes of what it returns takes: (..., queries, width), (..., keys, width), (..., keys, values) and a mask that
    broadcasts to (..., queries, keys); it gives (..., queries, values).
    """
    factor = 1 / math.sqrt(width) if scale is None else scale

    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if groups and key.shape[-3] != query.shape[-3]:
            key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
        scores = torch.matmul(query, key.transpose(-2, -1)) * factor
        lowest = torch.finfo(scores.dtype).min
        if causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if mask is not None:
            # no infinities: a row of them has no softmax
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
    given = {**dict(zip(("is_causal",), node.args[5:6], strict=False)), **node.kwargs}
    return {
        "causal": bool(given.get("is_causal", False)),
        "scale": given.get("scale"),
        "groups": bool(given.get("enable_gqa", False)),
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
    """Let what `function` does to the inputs stand where the node was, as operations of its layer, or the owner's."""
    values = [input_.meta["val"] for input_ in inputs]
    mode = next(each.fake_mode for each in values if hasattr(each, "fake_mode"))

    def positional(*tensors: Tensor) -> Tensor:  # the tracer counts arguments, those with a default, too
        return function(*tensors)

    with mode:  # a sum of products is one operation unless it is traced down to the last
        traced = make_fx(positional, tracing_mode="symbolic", pre_dispatch=node.target is ATTENTION)(*values)
    for name, value in [*traced.named_buffers(), *traced.named_parameters()]:
        raise AssertionError(f"{name} {tuple(value.shape)}: nothing is stored in what is spliced in")
    result = graft(model.graph, traced.graph, inputs, node, owner or node)
    assert isinstance(result, Node)
    node.replace_all_uses_with(result)
    model.graph.erase_node(node)
