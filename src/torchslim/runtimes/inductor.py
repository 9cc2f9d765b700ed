"""`torch.compile`: fused C++ kernels, made on this machine. It keeps no file."""

from __future__ import annotations

import shutil

import torch
from torch import Tensor

from torchslim.errors import RuntimeUnavailable
from torchslim.export import Captured
from torchslim.isolation import quiet
from torchslim.runtimes.base import Runtime, Session, Spec
from torchslim.runtimes.eager import session_of
from torchslim.structure import flatten


def _make(captured: Captured, spec: Spec, threads: int | None) -> tuple[Session, bytes | None]:
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        raise RuntimeUnavailable("runtime 'inductor' needs a C++ compiler: apt-get install g++")
    import torch._inductor.config as inductor_config

    # registers the passes that lower int8 graphs; without them such a graph runs several times slower, in silence
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401

    compiled = session_of(torch.compile(captured.program.module()), threads)
    seen: set[tuple[torch.Size, ...]] = set()

    def run(tensors: list[Tensor]) -> list[Tensor]:
        sizes = tuple(each.shape for each in tensors)
        if sizes in seen:
            return list(compiled(tensors))
        # freezing folds the weights into the kernels' layouts; torch.compile reads it while it compiles, which it
        # does at the first call and again when a size changes
        with quiet(), inductor_config.patch(freezing=True):
            answer = list(compiled(tensors))
        seen.add(sizes)
        return answer

    run(flatten(captured.inputs, captured.example))
    return run, None


RUNTIME = Runtime(
    name="inductor",
    suffix=None,
    make=_make,
    no_file="it compiles on the machine where it runs; save another runtime's file, or the model with ts.save",
)
