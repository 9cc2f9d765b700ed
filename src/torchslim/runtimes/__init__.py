"""Where a model runs: one file for each runtime, loaded when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from torchslim.arguments import checks_arguments
from torchslim.errors import DeployError, RecipeError
from torchslim.runtimes.base import Deployed, Runtime, Spec
from torchslim.runtimes.kernels import Kernel
from torchslim.steps import Inputs
from torchslim.usable import usable

RUNTIMES: Mapping[str, str] = {
    "eager": "PyTorch, op by op; saves a .pt2",
    "aoti": "AOTInductor: the same kernels as machine code; saves a .pt2 package, loaded only where it is trusted",
    "inductor": "torch.compile, C++ kernels made on this machine; saves nothing",
    "onnxruntime": "ONNX Runtime; saves a .onnx",
    "openvino": "OpenVINO; saves its IR, a .xml and a .bin",
}


def find_runtime(name: str) -> Runtime:
    """A runtime by name; its packages are only imported when it compiles."""
    if name not in RUNTIMES:
        raise RecipeError(f"runtime {name!r} is not known; one of {', '.join(RUNTIMES)}")
    runtime: Runtime = importlib.import_module(f"torchslim.runtimes.{name}").RUNTIME
    return runtime


@checks_arguments(DeployError)
def deploy(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    dynamic_shapes: Any = "batch",
) -> Deployed:
    """Compile `model` for a runtime; the result is called like the model and returns like the model.

    Args:
        model: a module, quantized or not; it is left as it was.
        example_inputs: a tuple of positional or a dict of keyword arguments.
        runtime: one of `RUNTIMES`.
        threads: a setting of this deployment alone; None leaves it to the runtime.
        dynamic_shapes: "batch" leaves the batch dimension free, None fixes all sizes, or a torch.export spec.

    Raises:
        ExportError: the model cannot be captured; names the line of its code.
        RuntimeUnavailable: a package or compiler is missing; says what to install.
    """
    return find_runtime(runtime).compile(usable(model, DeployError), example_inputs, dynamic_shapes, threads)


def kernels(deployed: Deployed) -> list[Kernel]:
    """What a deployed model really executes, kernel by kernel, asked of its runtime."""
    find = find_runtime(deployed.runtime).kernels
    assert find is not None, "every runtime tells"
    return find(deployed)


__all__ = ["RUNTIMES", "Deployed", "Kernel", "Runtime", "Spec", "deploy", "find_runtime", "kernels"]
