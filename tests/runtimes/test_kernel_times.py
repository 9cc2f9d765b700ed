"""Profiles of programs name the layers that their kernels compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchslim as ts
from torchslim.runtimes.kernel_times import kernel_times


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_kernels_of_a_partly_quantized_model_have_the_names_of_its_layers(runtime: str) -> None:
    """A float layer in a quantized graph lost its name when the exporter dropped the bias that folding had added."""
    if runtime == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    inputs = (torch.randn(1, 3, 8, 8),)
    quantized = ts.quantize.static(model.eval(), [inputs], layers={"3": "float"}, checks=None, runtime=runtime)
    deployed = ts.deploy(quantized, inputs, threads=1, runtime=runtime)
    kernels = kernel_times(deployed, deployed.example)
    assert kernels is not None
    by_layer = {path: kernel for kernel in kernels if (path := kernel.node.rpartition("/")[0])}
    assert by_layer["0"].integer
    assert not by_layer["3"].integer
    types = {"onnxruntime": ({"QLinearConv"}, {"Conv", "FusedConv"})}.get(runtime)
    assert types is None or all(by_layer[path].type in known for path, known in zip("03", types, strict=True))
    assert all(kernel.ms >= 0 for kernel in kernels)
    assert all(-1 <= place < len(kernels) for kernel in kernels for place in kernel.before)
    assert any(kernel.before for kernel in kernels)


def test_a_runtime_without_a_profiler_gives_none() -> None:
    deployed = ts.deploy(nn.Linear(3, 2), (torch.randn(1, 3),), runtime="eager")
    assert kernel_times(deployed, deployed.example) is None
