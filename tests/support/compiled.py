"""Models on a runtime as they are: `ts.deploy` would bring layers back to float that the runtime computes otherwise."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchslim.core.step import Inputs
from torchslim.runtimes import Deployed, find_runtime


def deploy(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    dynamic_shapes: Any = "batch",
) -> Deployed:
    """Compile a model for a runtime, unchecked."""
    return find_runtime(runtime).compile(model, example_inputs, dynamic_shapes, threads)
