"""Quantized graphs by hand: what a scheme asks for, whatever our own quantizer makes of it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver, PlaceholderObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from torchslim.export import Captured, capture
from torchslim.isolation import quiet
from torchslim.quantize.quantizer import strip_unused

aten = torch.ops.aten
WEIGHT = QuantizationSpec(
    dtype=torch.int8, observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=1e-20), quant_min=-127,
    quant_max=127, qscheme=torch.per_channel_symmetric, ch_axis=0,
)  # fmt: skip
STATIC = QuantizationSpec(
    dtype=torch.uint8, observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=1e-20), quant_min=0, quant_max=255,
    qscheme=torch.per_tensor_affine,
)  # fmt: skip
DYNAMIC = QuantizationSpec(
    dtype=torch.uint8, observer_or_fake_quant_ctr=PlaceholderObserver.with_args(eps=1e-7), quant_min=0, quant_max=255,
    qscheme=torch.per_tensor_affine, is_dynamic=True,
)  # fmt: skip
ACTIVATIONS = {"static": STATIC, "dynamic": DYNAMIC, "weights": None}
Mode = Literal["static", "dynamic", "weights"]


class Simple(Quantizer):
    """Annotates conv2d, linear, LSTM and GRU."""

    def __init__(self, mode: Mode) -> None:
        self.activation = ACTIVATIONS[mode]

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target in (aten.lstm.input, aten.gru.input):
                specs: dict[Any, Any] = {each: WEIGHT for each in node.args[2] if each.meta["val"].dim() == 2}
            elif node.target in (aten.conv2d.default, aten.linear.default):
                specs = {node.args[1]: WEIGHT}
            else:
                continue
            if self.activation is not None:
                specs[node.args[0]] = self.activation
            node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def quantized(model: nn.Module, x: Tensor, mode: Mode) -> tuple[GraphModule, Captured]:
    """The converted graph of a model of one tensor, and what is captured of it."""
    with quiet(), torch.no_grad():
        prepared = prepare_pt2e(capture(model.eval(), (x,)).program.module(), Simple(mode))
        prepared(x)
        converted = convert_pt2e(prepared)
    strip_unused(converted)
    return converted, capture(converted, (x,))


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
