"""Writes and reads `.pt2` files, exported programs, without the parts that could run code.

`torch.export.load` unpickles parts of a file (sample inputs, legacy weights, custom objects), evaluates the expressions
of symbolic sizes, executes guards, resolves any operator, and pastes names into generated code. So this module takes a
file apart first: it accepts only the entries that `pack_program` writes, checks the graph field by field, and lets
torch read a new archive of the parts that passed.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram

from torchslim.core.archives import unzip
from torchslim.core.isolation import quiet
from torchslim.core.schema import MIB, Limits, parse_json
from torchslim.errors import ArtifactError, ExportError
from torchslim.runtimes.program_check import check_payloads, check_program
from torchslim.runtimes.program_sizes import Unfit
from torchslim.runtimes.program_trial import try_program

PROGRAM = "models/model.json"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
KNOWN = re.compile(
    rf"{PROGRAM}|{WEIGHTS}|{CONSTANTS}|{SAMPLES}|data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|"
    r"archive_version|byteorder|\.data/version|\.data/serialization_id"
)
LIMITS = Limits(size_bytes=32 * MIB, values=1_500_000)
OWN = Limits(size_bytes=1024 * MIB, values=50_000_000)
"""Limits of a program that was just exported and still has the stack traces of its nodes."""
EXPANDED = 256 * MIB
"""The most bytes of a tensor that repeats its stored values."""


def pack_program(program: ExportedProgram) -> bytes:
    """Bytes of a `.pt2`: weights and operations, no example inputs, no traces of the exporting machine.

    Raises:
        ExportError: the program holds something that cannot be read back without unpickling.
    """
    buffer = io.BytesIO()
    example = program.example_inputs
    program._example_inputs = None  # they may be views of a data set, which would be saved too
    try:
        with quiet():
            torch.export.save(program, buffer)
            buffer.seek(0)
        return _repacked(buffer, OWN)
    except Exception as error:
        raise ExportError(f"the program cannot be saved as a .pt2: {error}; keep its state in plain tensors") from error
    finally:
        program._example_inputs = example


def load_program(file: BinaryIO) -> ExportedProgram:
    """Read a `.pt2`; nothing in it is unpickled or run.

    Raises:
        ArtifactError: the file is damaged, or holds something that `pack_program` never writes; the message says what.
    """
    with quiet():
        import torchao.quantization.pt2e  # noqa: F401 - registers the operations of quantized programs
    data = _repacked(file, LIMITS)
    with quiet():
        try:
            program = torch.export.load(io.BytesIO(data))
            try_program(program)
        except Exception as error:
            raise ArtifactError(f"the .pt2 file cannot be read: {type(error).__name__}: {_brief(error)}") from error
    return program


def _brief(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def _repacked(file: BinaryIO, limits: Limits) -> bytes:
    """Bytes of a new archive of the same program that holds only checked parts."""
    entries = _entries(file)
    program = _json(entries, PROGRAM, limits)
    try:
        for name in (WEIGHTS, CONSTANTS):
            config = _json(entries, name, limits)
            folder = name.rpartition("/")[0]
            files = {entry.rpartition("/")[2] for entry in entries if entry.rpartition("/")[0] == folder}
            for path, payload in check_payloads(config, files).items():
                _check_tensor(path, payload, len(entries[f"{folder}/{payload['path_name']}"]))
        check_program(program)
    except Unfit as error:
        raise ArtifactError(f"the .pt2 file is not loaded: {error}") from error
    entries[PROGRAM] = json.dumps(program).encode()
    entries[SAMPLES] = b""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return buffer.getvalue()


def _check_tensor(name: str, payload: dict[str, Any], stored: int) -> None:
    """Check that a tensor lies inside its stored bytes, and does not stand for many more."""
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE  # loads torch._dynamo: two seconds

    meta = payload["tensor_meta"]
    sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
    width = _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]].itemsize
    count, first = math.prod(sizes), meta["storage_offset"]["as_int"]
    last = first + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min((first, *strides)) < 0 or (count and (last + 1) * width > stored):
        raise Unfit(f"the tensor {name!r} is larger than its {stored} bytes")
    if count * width > max(stored, EXPANDED):
        raise Unfit(f"the tensor {name!r} stands for {count * width:,} bytes, {stored:,} are stored")


def _entries(file: BinaryIO) -> dict[str, bytes]:
    """Contents of the archive's files, by name without the folder that all of them are in."""
    entries: dict[str, bytes] = {}
    for path, data in unzip(file.read(), "the .pt2 file").items():
        name = path.partition("/")[2]
        if not KNOWN.fullmatch(name) or name in entries:
            raise ArtifactError(
                f"the .pt2 file holds {path!r}, which could be a pickle or native code; it is not loaded"
            )
        entries[name] = data
    if entries.get(SAMPLES):
        raise ArtifactError("the .pt2 file holds pickled sample inputs; it is not loaded")
    return entries


def _json(entries: dict[str, bytes], name: str, limits: Limits) -> Any:
    if name not in entries:
        raise ArtifactError(f"the .pt2 file is damaged: {name} is missing; copy it again")
    return parse_json(entries[name], f"the .pt2 file ({name})", ArtifactError, limits=limits)


def operators_of(data: bytes) -> set[str]:
    """Names of all operators that a checked `.pt2` calls, also in nested graphs."""
    graphs = [_json(_entries(io.BytesIO(data)), PROGRAM, OWN)["graph_module"]["graph"]]
    names = set()
    while graphs:
        for node in graphs.pop()["nodes"]:
            names.add(node["target"])
            graphs += [input_["arg"]["as_graph"]["graph"] for input_ in node["inputs"] if "as_graph" in input_["arg"]]
    return names
