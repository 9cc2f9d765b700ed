"""Write artifacts, their inputs and a script that times them where torchslim is not installed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchslim.artifact.phone_script import Timed, phone_script
from torchslim.artifact.storage import bench_script
from torchslim.artifact.times import MOST_PROGRAMS, TIMES
from torchslim.core.files import digest, json_bytes
from torchslim.errors import ArtifactError
from torchslim.runtimes import Deployed
from torchslim.runtimes.base import as_array
from torchslim.runtimes.kernel_listing import UNWANTED

PACK, PACK_FORMAT = "pack.json", "torchslim-bench-pack"
PHONE = "phone.sh"
PTE = ".pte"


def program_id(hashes: Mapping[str, str]) -> str:
    """Identity of a program: a digest of the SHA-256 of the runtime's files, by suffix."""
    return digest(dict(sorted(hashes.items())))


def id_of(deployed: Deployed) -> str:
    """Identity of a deployed program."""
    return program_id({suffix: hashlib.sha256(data).hexdigest() for suffix, data in deployed.files.items()})


def packed(artifacts: Mapping[str, Deployed], *, inputs: Sequence[Tensor] | None = None) -> dict[str, bytes]:
    """The files of a pack, by name: programs, inputs, pack.json and bench.py; for ExecuTorch programs phone.sh, too.

    Args:
        artifacts: deployed programs, by the name that they have in the answer.
        inputs: flat inputs for all programs, in place of their own examples.

    Raises:
        ArtifactError: no programs or too many, or a runtime that saves no file.
    """
    if not 0 < len(artifacts) <= MOST_PROGRAMS:
        raise ArtifactError(f"a pack takes 1 to {MOST_PROGRAMS} programs, got {len(artifacts)}; pack some of them")
    files: dict[str, bytes] = {}
    programs: list[dict[str, Any]] = []
    timed: list[Timed] = []
    exported = []
    for number, (name, deployed) in enumerate(artifacts.items()):
        if not deployed.files:
            raise ArtifactError(f"{name}: runtime {deployed.runtime!r} has no file that another machine could time")
        for suffix, data in deployed.files.items():
            files[f"{number}{suffix}"] = data
        exported += [data for suffix, data in deployed.files.items() if suffix == ".pt2"]
        example = deployed.example if inputs is None else list(inputs)
        files[f"{number}.npz"] = _example(deployed, example)
        spec = deployed.spec
        program = {"name": name, "program": id_of(deployed), "runtime": deployed.runtime, "threads": deployed.threads}
        file = f"{number}{deployed.suffixes[0]}"
        call = {"sizes": spec.sizes, "dtypes": spec.dtypes, "batch_axis": spec.batch_axis}
        programs.append({**program, "file": file, "example": f"{number}.npz", "spec": call})
        if file.endswith(PTE) and all(None not in sizes for sizes in spec.sizes):
            raw = {f"{number}-in{index:03d}.bin": leaf for index, leaf in enumerate(example)}
            files |= {key: _raw(leaf) for key, leaf in raw.items()}
            shapes = [list(leaf.shape) for leaf in raw.values()]
            timed.append(Timed(about={**program, "inputs": shapes}, file=file, inputs=tuple(raw)))
    files["bench.py"] = bench_script(exported)
    if len(timed) == len(programs):
        files[PHONE] = phone_script(timed)
    content = {
        "format": PACK_FORMAT,
        "gives": TIMES,
        "programs": programs,
        "disabled_optimizers": UNWANTED,
        "files": {key: hashlib.sha256(data).hexdigest() for key, data in sorted(files.items())},
    }
    return files | {PACK: json_bytes(content)}


def write_pack(folder: str | Path, artifacts: Mapping[str, Deployed]) -> Sequence[str]:
    """Write a pack to a new or empty folder; returns the names of its scripts."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} holds something already; name a new or an empty folder")
    files = packed(artifacts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():  # pack.json comes last: a folder that has it is complete
        (folder / name).write_bytes(data)
    return [name for name in ("bench.py", PHONE) if name in files]


def _example(deployed: Deployed, example: Sequence[Tensor]) -> bytes:
    """The inputs of a call, and the outputs that they give here."""
    arrays: dict[str, Any] = {f"in{index:03d}": as_array(leaf) for index, leaf in enumerate(example)}
    arrays |= {f"out{index:03d}": as_array(leaf) for index, leaf in enumerate(deployed.run(list(example)))}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _raw(leaf: Tensor) -> bytes:
    """The bytes of a tensor, row by row."""
    data: bytes = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data
