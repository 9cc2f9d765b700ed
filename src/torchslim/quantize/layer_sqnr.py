"""SQNR of every layer's output in a quantized model, against float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchslim.core.isolation import copy_model, preserved_globals, quiet
from torchslim.graph.export import layer_of
from torchslim.quantize.aten_ops import RECURRENT, weighted
from torchslim.quantize.batch_norm_folding import fold_batch_norms, settle
from torchslim.quantize.equalize import watch
from torchslim.quantize.fake_quantize import rounding_modules
from torchslim.quantize.modules import Prepared, QuantizedModule


def layer_sqnr(prepared: Prepared, quantized: QuantizedModule, leaves: Sequence[Tensor]) -> dict[str, float]:
    """SQNR in dB of each layer's output, by the layer's path; errors of earlier layers are included.

    Args:
        prepared: the model that was converted, with its weights before rounding.
        quantized: the converted model.
        leaves: flat inputs; the first samples of a batch are enough.
    """
    twin = _float_twin(prepared)
    names = {node.name: layer_of(node) for node in twin.graph.nodes if weighted(node) or node.target in RECURRENT}
    values: dict[str, Tensor] = {}

    def remember(node: Node, value: Any) -> None:
        values[node.name] = _first(value).detach().clone()  # later operations may change the value in place

    ratios: dict[str, float] = {}

    def compare(node: Node, value: Any) -> None:
        expected = values.pop(node.name)
        noise = float((expected.double() - _first(value).double()).square().sum())
        signal = float(expected.double().square().sum())
        decibels = (
            10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf if noise == 0 else -math.inf
        )
        path = names[node.name]
        ratios[path] = min(decibels, ratios.get(path, math.inf))

    inputs = [leaf.cpu() for leaf in leaves]
    watch(twin, [node for node in twin.graph.nodes if node.name in names], remember, [inputs])
    program = quantized.program
    watch(program, [node for node in program.graph.nodes if node.name in values], compare, [inputs])
    return ratios


def _float_twin(prepared: Prepared) -> GraphModule:
    """The prepared program with its batch norms folded and nothing rounded."""
    copied = copy_model(prepared)[0].cpu()
    assert isinstance(copied, Prepared)
    with quiet(), preserved_globals(), torch.no_grad():
        if copied.qat:
            settle(copied.program)
            fold_batch_norms(copied.program)
    for module in rounding_modules(copied):
        module.disable_fake_quant()
        module.disable_observer()
    return copied.program


def _first(value: Any) -> Tensor:
    tensor = value[0] if isinstance(value, (tuple, list)) else value
    assert isinstance(tensor, Tensor)
    return tensor
