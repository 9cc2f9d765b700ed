"""Checks a `.pte` of an artifact, and runs it once in a child process, before this process reads it.

ExecuTorch checks the tables of a file, but not all numbers that its kernels and XNNPACK take from it, so a damaged or
malicious file may end the process or ask for any memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence

from torch import Tensor

from torchslim.errors import ArtifactError
from torchslim.runtimes.file_trial import child_program, try_files

HEADER = struct.Struct("<I4s4sIQQ")
"""Offset of the root table, magic of the flatbuffer and of the header, its length, bytes of the program, segments."""
CHILD = child_program(  # ExecuTorch's Python package needs torch
    imports="""
import numpy, torch
from executorch.runtime import Runtime
""",
    run="""
dtypes = json.load(open(f"{folder}/model.dtypes"))
tensors = [torch.from_numpy(value).to(getattr(torch, dtype)) for value, dtype in zip(values, dtypes)]
program = Runtime.get().load_program(open(f"{folder}/{file}", "rb").read())
program.load_method("forward").execute(tensors)
program.load_method("torchslim_kernels").execute([])
""",
)


def check_pte(data: bytes) -> None:
    """Check that the parts that a `.pte` announces lie inside of it.

    Raises:
        ArtifactError: the file is no `.pte`, or not whole.
    """
    if len(data) >= HEADER.size:
        root, magic, extended, length, program, segments = HEADER.unpack_from(data)
        inside = root < program <= len(data) and segments <= len(data) and length >= HEADER.size - 8
        if magic[:2] == b"ET" and extended == b"eh00" and inside:
            return
    raise ArtifactError("the ExecuTorch model is not loaded: it is no .pte file, or not whole; save it again")


def survive_pte(files: Mapping[str, bytes], inputs: Sequence[Tensor]) -> str:
    """Run a model of an artifact once in a child process; return ExecuTorch's message, empty if the model runs.

    Raises:
        ArtifactError: as `try_files`.
    """
    dtypes = json.dumps([str(tensor.dtype).removeprefix("torch.") for tensor in inputs]).encode()
    return try_files({**files, ".dtypes": dtypes}, inputs, child=CHILD, engine="ExecuTorch", package="executorch")
