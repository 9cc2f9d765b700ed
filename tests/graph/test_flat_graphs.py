"""Graphs go through pickles with their nodes, names and layers; graphs inside of graphs, too."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from torchslim.errors import ModelError
from torchslim.graph.export import capture, module_of
from torchslim.graph.flat_graphs import FlatGraph, FlatNode, Operation, flat_module, restored

META = ("kept",)


def exported(model: nn.Module, *inputs: Tensor) -> GraphModule:
    graph = module_of(capture(model.eval(), inputs).program)
    assert isinstance(graph, GraphModule)
    return graph


def through_a_pickle(graph: GraphModule) -> GraphModule:
    again = pickle.loads(pickle.dumps(flat_module(graph, META)))
    assert isinstance(again, GraphModule)
    return again


def shown(graph: GraphModule) -> list[Any]:
    """All of the nodes but the values of their capture."""
    return [
        (node.name, node.op, str(node.target), str(node.args), str(node.kwargs), node.meta.get("nn_module_stack"))
        for node in graph.graph.nodes
    ]


class Chain(nn.Module):
    """Operations one after the other, as many as asked for; one weight is used by all."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.length = length
        self.inner = nn.ModuleDict({"layer": nn.Linear(width, width)})
        self.register_buffer("shift", torch.arange(float(width)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.length):
            x = torch.cat([self.inner["layer"](x).relu(), x], -1)[..., : x.shape[-1]] + index * self.shift
        return x


@given(length=st.integers(1, 6), width=st.integers(1, 5))
@settings(max_examples=4, deadline=None)
def test_a_graph_comes_back_with_its_nodes_names_and_layers(length: int, width: int) -> None:
    x = torch.randn(2, width)
    graph = exported(Chain(length, width), x)
    graph.meta |= {"kept": {"a": 1}, "dropped": lambda: None}
    again = through_a_pickle(graph)
    assert shown(again) == shown(graph)
    assert torch.equal(again(x)[0], graph(x)[0])
    assert again.meta == {"kept": {"a": 1}}
    assert list(again.state_dict()) == list(graph.state_dict())
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in graph.named_parameters()]
    values = [(node.meta["val"], other.meta["val"]) for node, other in zip(graph.graph.nodes, again.graph.nodes, strict=True)
              if isinstance(node.meta.get("val"), Tensor)]  # fmt: skip
    assert values
    assert all((one.shape, one.dtype) == (other.shape, other.dtype) for one, other in values)


def test_a_long_graph_does_not_reach_the_recursion_limit() -> None:
    x = torch.randn(1, 2)
    graph = exported(Chain(120, 2), x)
    answer = graph(x)[0]
    before = sys.getrecursionlimit()  # other libraries raise it
    sys.setrecursionlimit(len(inspect.stack(0)) + len(graph.graph.nodes) // 2)
    try:
        again = through_a_pickle(graph)
    finally:
        sys.setrecursionlimit(before)
    assert torch.equal(again(x)[0], answer)


class Branch(nn.Module):
    """A branch on data, whose two sides are graphs inside of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin() * 2, lambda y: y.cos(), (x,))


@pytest.mark.parametrize("sign", [1, -1])
def test_graphs_inside_of_a_graph_come_back(sign: int) -> None:
    x = sign * torch.rand(3)
    graph = exported(Branch(), x)
    again = through_a_pickle(graph)
    assert sum(isinstance(module, GraphModule) for module in again.modules()) == 3
    assert torch.equal(again(x)[0], graph(x)[0])
    assert torch.equal(copy.deepcopy(again)(x)[0], graph(x)[0])


def test_a_graph_inside_of_a_plain_module_leaves_the_module_as_it_was() -> None:
    x = torch.randn(2, 3)
    holder = nn.ModuleDict({"graph": exported(nn.Linear(3, 3), x), "other": nn.Linear(3, 1)})
    again = pickle.loads(pickle.dumps(flat_module(holder, META)))
    assert torch.equal(again["graph"](x)[0], holder["graph"](x)[0])
    assert isinstance(holder["graph"], GraphModule)
    plain = nn.Linear(2, 2)
    assert flat_module(plain, META) is plain
    assert isinstance(flat_module(holder, META)["graph"], FlatGraph)


def test_an_operation_that_this_process_lacks_is_named() -> None:
    missing = Operation("aten.conv9d.default")
    node = FlatNode(name="a", op="call_function", target=missing, args=(), kwargs={}, meta={})
    with pytest.raises(ModelError, match=r"torch\.ops\.aten\.conv9d\.default"):
        restored([node], {})
