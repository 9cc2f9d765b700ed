"""PyTorch: runs the exported program op by op, with its integer kernels where it has some; saves a `.pt2`."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from torchslim.core.isolation import quiet, torch_threads
from torchslim.errors import ExportError
from torchslim.graph.export import WRAPPED, Captured, module_of
from torchslim.graph.layers import multiplies
from torchslim.runtimes.base import Deployed, Runtime
from torchslim.runtimes.bucketed import Bucketed
from torchslim.runtimes.kernel_listing import eager_kernels
from torchslim.runtimes.pt2 import load_program, pack_program
from torchslim.runtimes.spec import Kernel, Session, Spec
from torchslim.runtimes.torch_integer_kernels import lower


def session_of(module: Any, threads: int | None) -> Session:
    """A session that runs an exported program's module."""

    def run(tensors: list[Tensor]) -> list[Tensor]:
        with torch.no_grad(), torch_threads(threads):
            return list(module(*tensors))

    return run


def _make(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    session = session_of(lower(module_of(captured.program)), threads)
    try:
        return session, pack_program(captured.program)
    except ExportError:  # custom operators run here, but a file may not call them
        return session, None


def _read(payload: bytes, spec: Spec, threads: int | None) -> Session:
    with quiet():
        return session_of(lower(module_of(load_program(io.BytesIO(payload)))), threads)


def on_eager(deployed: Deployed, threads: int | None) -> Deployed:
    """The program of a model that is deployed elsewhere, in PyTorch; it has no file."""
    if isinstance(deployed, Bucketed):
        return deployed.mapped(lambda program: on_eager(program, threads), RUNTIME)
    with quiet():
        session = session_of(lower(module_of(deployed.program.loaded())), threads)
    return Deployed(session, deployed.program, RUNTIME, threads=threads, payload=None)


def _kernels(deployed: Deployed) -> list[Kernel]:
    module = module_of(deployed.program.loaded())
    layers = iter(deployed.spec.layers)  # a saved program has no layer names; the spec lists them in its order
    for node in module.graph.nodes:
        if multiplies(node) and (layer := next(layers, None)) is not None:
            node.meta["nn_module_stack"] = {"": (WRAPPED + layer["layer"], "")}
    return eager_kernels(lower(module))


RUNTIME = Runtime(
    name="eager",
    suffix=".pt2",
    make=_make,
    read=_read,
    kernels=_kernels,
    no_file="the program cannot be saved as a .pt2, as one that calls an operator of the user's own",
)
