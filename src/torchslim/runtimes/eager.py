"""PyTorch itself: the exported program, run op by op. The file is a `.pt2`."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from torchslim.export import Captured
from torchslim.isolation import quiet, torch_threads
from torchslim.runtimes.base import Runtime, Session, Spec
from torchslim.runtimes.pt2 import load_program, pack_program
from torchslim.structure import describe


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an output, in the structure's order."""
    leaves: list[Tensor] = []
    describe(value, leaves, {})
    return leaves


def session_of(module: Any, spec: Spec, threads: int | None) -> Session:
    """A session that calls a module with the program's own arguments."""

    def run(leaves: list[Tensor]) -> list[Tensor]:
        args, kwargs = spec.call_arguments(leaves)
        with torch.no_grad(), torch_threads(threads):
            return tensors_of(module(*args, **kwargs))

    return run


def _make(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    return session_of(captured.program.module(), spec, threads), pack_program(captured.program)


def _read(payload: bytes, spec: Spec, threads: int | None) -> Session:
    with quiet():
        return session_of(load_program(io.BytesIO(payload)).module(), spec, threads)


RUNTIME = Runtime(name="eager", suffix=".pt2", make=_make, read=_read)
