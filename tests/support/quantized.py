"""Small quantized networks that the runtimes are tested with, in each scheme."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from tests.support.quantized_graphs import int8_graph
from torchslim.graph.export import Captured, capture
from torchslim.quantize import static

Mode = Literal["static", "dynamic", "weights"]


def quantized(model: nn.Module, x: Tensor, mode: Mode) -> tuple[nn.Module, Captured]:
    """The converted graph of a model of one tensor, called like the model, and what is captured of it."""
    if mode == "static":
        converted: nn.Module = static(model.eval(), [(x,)])
        return converted, capture(converted, (x,))
    graph = int8_graph(model, (x,), dynamic=mode == "dynamic")
    return Lone(graph), capture(Lone(graph), (x,))


class Lone(nn.Module):
    """A graph of one output, without the tuple around it."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)[0]


class Block(nn.Module):
    """The half of a transformer's layer that has the large linears, its residual addition included."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
        return self.head(x.mean(1))


class Tagger(nn.Module):
    """A bidirectional LSTM or GRU and a linear."""

    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(6, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])
