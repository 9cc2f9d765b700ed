"""Linear layers with an activation that something reads in float: ONNX Runtime computes them on integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.compiled import deploy
from torchslim.artifact.integer_coverage import lowered
from torchslim.quantize import convert, prepare
from torchslim.runtimes import kernels

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "clamp_min": lambda x: x.clamp_min(-0.2),
    "clamp_max": lambda x: x.clamp_max(0.2),
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "elu": F.elu,
    "softplus": F.softplus,
}


class Activated(nn.Module):
    """A linear layer for each activation; a norm reads it, in float. The layer is written as a product where asked."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        self.product = product
        self.layers = nn.ModuleDict({name: nn.Linear(16, 12) for name in ACTIVATIONS})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        for name, activation in ACTIVATIONS.items():
            layer: Any = self.layers[name]
            y = x @ layer.weight.T + layer.bias if self.product else layer(x)
            found.append(F.layer_norm(activation(y), (12,)))
        return tuple(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "sizes", "product"),
    [((8, 16), "batch", False), ((8, 16), "batch", True), ((8, 16), None, True), ((2, 5, 16), None, False)],
)
def test_every_layer_runs_on_integers_and_bounds_its_values(shape: Any, sizes: Any, product: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Activated(product).eval(), torch.randn(shape)
    prepared = prepare(model, (x,), dynamic_shapes=sizes)
    prepared.calibrate([(x,)])
    quantized = convert(prepared)
    deployed = deploy(quantized, (x,), threads=1, dynamic_shapes=sizes)
    claimed = [record for record in prepared.records if record.activation_bits == 8 and not record.reason]
    assert len(claimed) == len(ACTIVATIONS)
    assert all(each.integer for each in lowered(deployed, prepared.records).layers)
    assert not [each.type for each in kernels(deployed) if each.type in ("Gemm", "FusedGemm", "MatMul")]
    with torch.no_grad():
        for name, wanted, found in zip(ACTIVATIONS, quantized(x), deployed(x), strict=True):
            assert float((wanted - found).abs().max()) < 1e-3, name
