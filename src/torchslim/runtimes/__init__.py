"""Runtimes that deployed models run on: one module for each, imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from torchslim.errors import RecipeError
from torchslim.runtimes.base import Deployed, Runtime
from torchslim.runtimes.bucketed import Bucketed
from torchslim.runtimes.spec import Kernel, Spec

RUNTIMES: Mapping[str, str] = {
    "eager": "PyTorch, op by op; saves a .pt2",
    "aoti": "AOTInductor: the same kernels as machine code; saves a .pt2 package, loaded only where it is trusted",
    "inductor": "torch.compile, C++ kernels made on this machine; saves nothing",
    "onnxruntime": "ONNX Runtime; saves a .onnx",
    "executorch": "ExecuTorch with XNNPACK, for phones; saves a .pte",
    "openvino": "OpenVINO; saves its IR, a .xml and a .bin",
}


def find_runtime(name: str) -> Runtime:
    """Runtime named `name`; its packages are imported only when it compiles or reads a model."""
    if name not in RUNTIMES:
        raise RecipeError(f"runtime {name!r} is not known; one of {', '.join(RUNTIMES)}")
    runtime: Runtime = importlib.import_module(f"torchslim.runtimes.{name}").RUNTIME
    return runtime


def kernels(deployed: Deployed) -> list[Kernel]:
    """Kernels that a deployed model really executes, as its runtime lists them."""
    if isinstance(deployed, Bucketed):
        return kernels(deployed.median)
    list_kernels = find_runtime(deployed.runtime).kernels
    assert list_kernels is not None, "every runtime lists its kernels"
    return list_kernels(deployed)


__all__ = ["RUNTIMES", "Deployed", "Kernel", "Runtime", "Spec", "find_runtime", "kernels"]
