"""`.pt2` files: exported programs, without the parts that could run code when they are read."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram

from torchslim.errors import ArtifactError


def pack_program(program: ExportedProgram) -> bytes:
    """The bytes of a `.pt2`, without example inputs: those may be views that drag a data set along."""
    buffer = io.BytesIO()
    example = program.example_inputs
    program._example_inputs = None
    try:
        torch.export.save(program, buffer)
    finally:
        program._example_inputs = example
    return buffer.getvalue()


def load_program(file: BinaryIO) -> ExportedProgram:
    """Read a `.pt2` after `check_program` has passed it; torchao's quantization ops are registered first."""
    check_program(file)
    file.seek(0)
    import torchao.quantization.pt2e  # noqa: F401 - registers quantized_decomposed ops

    try:
        return torch.export.load(file)
    except Exception as error:
        raise ArtifactError(f"the .pt2 file cannot be read: {type(error).__name__}: {error}") from error


def check_program(file: BinaryIO) -> None:
    """Refuse what `torch.export.load` would unpickle or run as native code.

    Raises:
        ArtifactError: saying what was found.
    """
    try:
        archive = zipfile.ZipFile(file)
        names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ArtifactError(f"the .pt2 file is not an archive: {error}") from error
    for name in names:
        parts = name.split("/")
        if "aotinductor" in parts:
            raise ArtifactError("the .pt2 file holds native code; it is not loaded")
        if any(part.startswith(("custom_obj_", "opaque_obj_")) for part in parts):
            raise ArtifactError(f"the .pt2 file holds a pickled object ({name}); it is not loaded")
        if name.endswith(".json") and _pickles(json.loads(archive.read(name))):
            raise ArtifactError(f"the .pt2 file asks for unpickling ({name}); it is not loaded")
        if "sample_inputs" in parts and archive.getinfo(name).file_size:
            try:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            except Exception as error:
                raise ArtifactError(
                    f"the .pt2 file's sample inputs would run code ({name}); it is not loaded"
                ) from error


def _pickles(value: Any) -> bool:
    if isinstance(value, dict):
        return any((key == "use_pickle" and each) or _pickles(each) for key, each in value.items())
    return isinstance(value, list) and any(map(_pickles, value))
