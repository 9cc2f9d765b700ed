"""Edits of captured graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import torchslim as ts
from torchslim.graph.export import capture, module_of
from torchslim.graph.rewrite import inputs_first, place_constants


class Positions(nn.Module):
    """Makes tensors on the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return x + self.embed(places) + torch.full((4,), 0.5, device=x.device)


def test_a_graph_makes_its_tensors_on_the_device_that_it_is_placed_on() -> None:
    """The meta device stands for any other: a graph that mixes devices fails on it."""
    example = (torch.randn(2, 5, 4),)
    program = capture(Positions(), example).program
    graph = module_of(program)
    (before,) = graph(*example)
    graph.to("meta")
    place_constants(graph, torch.device("meta"))
    assert graph(example[0].to("meta"))[0].is_meta
    graph.to_empty(device="cpu")
    graph.load_state_dict(module_of(program).state_dict())
    place_constants(graph, torch.device("cpu"))
    assert torch.equal(graph(*example)[0], before)


def test_inputs_come_before_operations_in_their_order() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    half = graph.call_function(torch.div, (x, 2))
    y = graph.placeholder("y")
    graph.output(graph.call_function(torch.sub, (half, y)))
    inputs_first(graph)
    assert [node.op for node in graph.nodes] == [
        "placeholder",
        "placeholder",
        "call_function",
        "call_function",
        "output",
    ]
    assert [node.name for node in graph.nodes][:2] == ["x", "y"]
    assert GraphModule(nn.Module(), graph)(6, 1) == 2


class Two(nn.Module):
    """Two inputs, both rounded: the conversion puts the operations of the first before the second input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.one(x).mean(1) + self.two(y).mean(1)


def test_sizes_of_two_rounded_inputs_stay_free_on_onnxruntime() -> None:
    examples: Any = [(torch.randn(2, n, 8), torch.randn(2, n + 1, 8)) for n in (3, 5)]
    deployed: Any = ts.deploy(ts.quantize.dynamic(Two().eval(), examples), examples)
    assert deployed.spec.sizes == [[None, None, 8], [None, None, 8]]
    assert deployed.notes == []
