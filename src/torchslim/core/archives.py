"""Read archives from untrusted writers: unpacked data is never larger than the archive.

Only zip files without compression are read, as torch, numpy and `files.bundle` write them: a compressed megabyte can
hold gigabytes. The size of an array or weight is compared with its bytes before memory is allocated for it.
"""

from __future__ import annotations

import ast
import io
import math
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from torchslim.core.schema import Limits, parse_json
from torchslim.errors import ArtifactError

ENTRIES = 100_000
ARRAYS = re.compile(rb"[<|=]?[biufc]\d{1,2}")
HEADERS = Limits(depth=6)


def unzip(data: bytes, what: str) -> dict[str, bytes]:
    """Files of an uncompressed zip by name, in their order.

    Raises:
        ArtifactError: damaged, compressed, encrypted, too many files, a duplicate name, or files that overlap.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > ENTRIES:
                raise ArtifactError(f"{what} holds {len(infos):,} files, at most {ENTRIES:,} are read; save it again")
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
                raise ArtifactError(f"{what} holds compressed files, which torchslim never writes; save it again")
            if sum(info.file_size for info in infos) > len(data):
                raise ArtifactError(f"{what} would unpack to more than its own size; it is not read")
            files = {info.filename: archive.read(info) for info in infos}
    except ArtifactError:
        raise
    # ValueError, LookupError and OverflowError: fields of a damaged directory
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        LookupError,
        OverflowError,
        MemoryError,
    ) as error:
        raise ArtifactError(f"{what} is damaged: {type(error).__name__}: {error}; copy it again") from error
    if len(files) < len(infos):
        raise ArtifactError(f"{what} holds a file twice; it is not read")
    return files


def read_arrays(data: bytes, what: str) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of an `.npz` of numbers, by name; never unpickles.

    Raises:
        ArtifactError: damaged, compressed, objects in place of numbers, or a shape that does not fit its bytes.
    """
    arrays = {}
    for name, content in unzip(data, what).items():
        try:
            arrays[name.removesuffix(".npy")] = _array(content)
        except (ValueError, SyntaxError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
            raise ArtifactError(f"{what} cannot be read: {name!r}: {error}; save it again") from error
    return arrays


def _array(content: bytes) -> np.ndarray[Any, Any]:
    wide = content[6:7] != b"\x01"
    start = 12 if wide else 10
    if content[:6] != b"\x93NUMPY" or len(content) < start:
        raise ValueError("no array of numpy")
    end = start + int.from_bytes(content[8:start], "little")
    if end - start > 10_000 or end > len(content):
        raise ValueError("its header is damaged")
    header = ast.literal_eval(content[start:end].decode("latin-1").strip())
    shape, kind = header["shape"], header["descr"]
    if not isinstance(kind, str) or not ARRAYS.fullmatch(kind.encode()):
        raise ValueError(f"it holds {kind!r} instead of plain numbers")
    if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{shape!r} is no shape")
    dtype = np.dtype(kind)
    if math.prod(shape) * dtype.itemsize != len(content) - end or max(shape, default=0) >= 2**62:
        raise ValueError(f"its shape {shape!r} does not fit its {len(content) - end} bytes")
    flat = np.frombuffer(content, dtype, offset=end)
    return flat.reshape(shape, order="F" if header["fortran_order"] else "C").copy(order="K")


def read_tensors(data: bytes, what: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, by name.

    Raises:
        ArtifactError: damaged, or its header is beyond the limits of JSON.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ArtifactError(f"{what} cannot be read: it is no safetensors file; save it again")
    header = parse_json(data[8 : 8 + length].rstrip(b" "), f"the header of {what}", ArtifactError, limits=HEADERS)
    if not isinstance(header, dict):
        raise ArtifactError(f"{what} cannot be read: its header is no object; save it again")
    try:
        return dict(load_tensors(data))
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise ArtifactError(f"{what} cannot be read: {type(error).__name__}: {error}; save it again") from error


def read_masks(data: bytes, shapes: Mapping[str, list[int]], what: str) -> dict[str, Tensor]:
    """Boolean tensors from packed bits, eight per byte.

    Raises:
        ArtifactError: damaged, names other than those of `shapes`, or bits that do not fit a shape.
    """
    packed = read_tensors(data, what)
    if set(packed) != set(shapes):
        raise ArtifactError(f"{what} holds other masks than the manifest lists; save it again")
    masks = {}
    for name, shape in shapes.items():
        bits, count = packed[name], math.prod(shape)
        if bits.dtype != torch.uint8 or bits.dim() != 1 or len(bits) != -(-count // 8):
            raise ArtifactError(f"{what} is damaged: {name!r} does not fit its shape {shape}; save it again")
        masks[name] = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).reshape(shape)
    return masks
