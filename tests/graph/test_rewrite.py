"""Edits of captured graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchslim.graph.export import capture, module_of
from torchslim.graph.rewrite import place_constants


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
