"""What is saved can be loaded: weights as safetensors, programs beside them, the rest JSON, every file hashed.

artifact.json         format version, runtime, how the model is called, SHA-256 of every other file
model.onnx, .xml ...  the runtime's file or files, and the exported program, model.pt2
weights.safetensors   the module's state, for `load_module`; masks.safetensors: packed bits
surgery.json          which channels were removed from the module that the factory makes
example.npz           example inputs and the outputs they gave
bench.py              times the model where torchslim is not installed
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from torchslim.errors import ArtifactError, StorageError
from torchslim.export import Captured
from torchslim.files import bundle, digest, sha256, write_bytes, write_json
from torchslim.isolation import quiet
from torchslim.machine import describe_machine, instruction_set
from torchslim.measure import Timings
from torchslim.quantize import QuantizedModule
from torchslim.runtimes import Deployed, Spec, deploy, find_runtime
from torchslim.runtimes.pt2 import load_program
from torchslim.state import pack_masks, pack_state, pack_surgery, restore, unpack_masks
from torchslim.steps import Inputs
from torchslim.structure import build

FORMAT = "torchslim-artifact"
VERSION = 1
MANIFEST = "artifact.json"
PROGRAM = "model.pt2"
WEIGHTS = "weights.safetensors"
SURGERY = "surgery.json"
STAGING = ".saving"
BENCH = Path(__file__).parent / "artifact_bench.py"


def save(
    model: nn.Module | Deployed,
    folder: str | Path,
    *,
    example_inputs: Inputs | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a module or a deployed model.

    A module's weights are saved for `load_module`; with `example_inputs` its program is saved too, for `load`. A
    deployed model is saved with its runtime's file, and loads with `load`.

    Raises:
        ArtifactError: the folder holds something else.
        StorageError: the disk is full; what was there before is kept.
    """
    if isinstance(model, Deployed):
        return write_artifact(folder, deployed=model, masks=masks)
    quantized = any(isinstance(module, QuantizedModule) for module in model.modules())
    if example_inputs is None:
        if quantized:
            raise ArtifactError(
                "a quantized model is saved as a program, no factory makes it again; give save(..., example_inputs=...)"
            )
        return write_artifact(folder, module=model, masks=masks)
    deployed = deploy(model, example_inputs, runtime="eager")
    return write_artifact(folder, deployed=deployed, module=None if quantized else model, masks=masks)


def write_artifact(
    folder: str | Path,
    *,
    deployed: Deployed | None = None,
    module: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write an artifact folder, in the place of the artifact that is there; other files in it stay.

    Everything is written beside first and then renamed, the manifest last: on a full disk the old artifact is kept,
    and a folder that has a manifest is whole.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; name a folder to save to")
    if folder.is_dir() and any(folder.iterdir()) and not _ours(folder):
        raise ArtifactError(f"{folder} holds something that torchslim did not save; name an empty or a new folder")
    files: dict[str, bytes] = dict(extra or {})
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "machine": describe_machine()}
    if deployed is not None:
        files |= _deployed_files(deployed)
        manifest |= {
            "runtime": deployed.runtime,
            "threads": deployed.threads,
            "spec": deployed.spec.to_json(),
            "quantized": deployed.quantized,
        }
    if module is not None:
        files[WEIGHTS], manifest["aliases"], manifest["channels_last"] = pack_state(module)
        record = pack_surgery(module)
        if record is not None:
            files[SURGERY] = record
    if masks:
        files["masks.safetensors"], manifest["mask_shapes"] = pack_masks(masks)
    manifest["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    _replace(folder, files, manifest)
    return folder


def _replace(folder: Path, files: Mapping[str, bytes], manifest: dict[str, Any]) -> None:
    old = _listed(folder)
    staging = folder / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a save that was killed
        for name, data in files.items():
            write_bytes(staging / name, data)
        write_json(staging / MANIFEST, manifest | {"digest": digest(manifest)})
        # from here on nothing is written, only renamed
        (folder / MANIFEST).unlink(missing_ok=True)
        for name in (*files, MANIFEST):
            (staging / name).replace(folder / name)
        for name in old - set(files):  # a stale model.onnx would be taken for this model
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _listed(folder: Path) -> set[str]:
    """The files of the artifact that is in a folder, by their names alone."""
    try:
        return {name for name in json.loads((folder / MANIFEST).read_text())["files"] if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def load(
    folder: str | Path, *, runtime: str | None = None, threads: int | None = None, trusted: bool = False
) -> Deployed:
    """Load a saved model for use; outputs are bitwise those of the model that was saved.

    Nothing is unpickled, and every file is checked against its SHA-256. With `runtime`, the saved program is
    compiled for another runtime than the one it was saved for.

    Args:
        folder: what `save` wrote.
        runtime: None takes the one that it was saved for.
        threads: None takes those that it was saved with.
        trusted: load a file of machine code too (runtime "aoti"): whoever made the artifact can do here what you can.

    Raises:
        ArtifactError: no artifact, a newer format, a changed or missing file, nothing that runs, or machine code that
            is not trusted.
        RuntimeUnavailable: the artifact's runtime is not installed.
    """
    opened = open_artifact(folder)
    manifest = opened.manifest
    if "spec" not in manifest:
        raise ArtifactError(f"{folder} holds weights only; rebuild the model with ts.load_module(folder, factory)")
    try:
        spec = Spec(**manifest["spec"])
        chosen = find_runtime(runtime or manifest["runtime"])
    except TypeError as error:
        raise ArtifactError(f"{folder}/{MANIFEST} is damaged: {error}") from error
    stored = chosen.read is not None and chosen.name == manifest["runtime"]
    if stored and chosen.native:
        _check_native(folder, spec, trusted)
    if manifest["quantized"] and spec.instruction_set != instruction_set():
        warnings.warn(
            f"{folder} was quantized for {spec.instruction_set}, this machine has {instruction_set()}: int8 may be "
            "slower here, and without VNNI less accurate; quantize again on such a machine",
            stacklevel=2,
        )
    threads = threads or manifest["threads"]
    example = opened.example()
    payload: bytes | None = None
    with quiet():
        if chosen.read is not None and stored:
            files = {suffix: opened.read(f"model{suffix}") for suffix in chosen.suffixes}
            payload = bundle(files) if chosen.beside else next(iter(files.values()))
            session = chosen.read(payload, spec, threads)
        else:
            session, payload = chosen.make(_recaptured(opened, spec, example), spec, threads)
    return Deployed(
        session, spec, runtime=chosen.name, threads=threads, payload=payload, example=example,
        program=lambda: opened.read(PROGRAM), quantized=manifest["quantized"], no_file=chosen.no_file,
        suffixes=chosen.suffixes,
    )  # fmt: skip


def _check_native(folder: str | Path, spec: Spec, trusted: bool) -> None:
    """Machine code: it must be trusted, and for such a processor."""
    if not trusted:
        raise ArtifactError(
            f"{folder} holds machine code, which can do anything when it is loaded; if you trust who made it, load it "
            "with trusted=True, else with runtime='inductor', which compiles its program here"
        )
    if spec.instruction_set != instruction_set():
        raise ArtifactError(
            f"{folder} holds machine code for {spec.instruction_set}, this machine has {instruction_set()}; load it "
            "with runtime='inductor', which compiles its program here"
        )


def load_module(folder: str | Path, factory: Callable[[], nn.Module]) -> nn.Module:
    """A module from `factory` with the saved weights, in their saved precision.

    Args:
        folder: what `save` wrote.
        factory: makes the model as it was before channels were pruned, the removal is done again on it; or one of the
            pruned architecture. Its weights do not matter. What it returns is taken over.

    Raises:
        ArtifactError: when the factory's model has other parameters than the saved one; names them.
    """
    return open_artifact(folder).into(factory())


@dataclass(frozen=True, slots=True)
class Opened:
    """A checked artifact."""

    folder: Path
    manifest: dict[str, Any]

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        if name not in self.manifest["files"]:
            raise ArtifactError(f"{self.folder} lists no {name}; it was saved without it")
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise ArtifactError(f"{self.folder / name} cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][name]:
            raise ArtifactError(f"{self.folder / name} was changed since the artifact was opened; load it again")
        return data

    def into(self, module: nn.Module) -> nn.Module:
        """The saved module, made from one of its kind; see `load_module`."""
        if WEIGHTS not in self.manifest["files"]:
            raise ArtifactError(f"{self.folder} holds no weights, only a program; use ts.load(folder)")
        record = self.read(SURGERY) if SURGERY in self.manifest["files"] else None
        return restore(module, self.read(WEIGHTS), self.manifest, record)

    def example(self) -> list[Tensor]:
        """The example inputs."""
        try:
            arrays = np.load(io.BytesIO(self.read("example.npz")), allow_pickle=False)
            dtypes = self.manifest["spec"]["dtypes"]
            return [torch.from_numpy(arrays[f"in{i:03d}"]).to(getattr(torch, dtype)) for i, dtype in enumerate(dtypes)]
        except (ValueError, KeyError, OSError, AttributeError, TypeError, BadZipFile) as error:
            raise ArtifactError(f"{self.folder}/example.npz cannot be read: {error}") from error

    def masks(self) -> dict[str, Tensor]:
        """The masks, by parameter name."""
        if "masks.safetensors" not in self.manifest["files"]:
            return {}
        return unpack_masks(self.read("masks.safetensors"), self.manifest["mask_shapes"])


def open_artifact(folder: str | Path) -> Opened:
    """Check a folder's manifest and every file it lists."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a torchslim artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise KeyError("format")
        version = int(manifest["version"])
        files: dict[str, str] = dict(manifest["files"])
        whole = version > VERSION or manifest["digest"] == digest(
            {key: value for key, value in manifest.items() if key != "digest"}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged or not torchslim's: {error}; copy the artifact again") from error
    if version > VERSION:
        raise ArtifactError(f"{folder} has format version {version}, this torchslim reads up to {VERSION}; upgrade it")
    if not whole:
        raise ArtifactError(f"{path} was truncated or changed since it was saved; copy the artifact again")
    for name, expected in files.items():
        inside = (folder / name).resolve()
        if Path(name).is_absolute() or folder.resolve() not in inside.parents:
            raise ArtifactError(f"{path} names a file outside its folder: {name!r}")
        if not inside.is_file():
            raise ArtifactError(f"{folder} is incomplete: {name} is missing; copy it again")
        if sha256(inside) != expected:
            raise ArtifactError(f"{folder / name} was truncated or changed since it was saved; copy it again")
    return Opened(folder, manifest)


def render_timings(timings: Timings, first: str) -> list[dict[str, Any]]:
    """Rows for `torchslim bench`: latency and speed-up over the first artifact."""
    rows = []
    for name in timings.rounds:
        latency, ratio = timings.latency(name), timings.speedup(name, first)
        rows.append(
            {
                "artifact": name,
                "latency_ms": {
                    "median": latency.median,
                    "p10": latency.p10,
                    "p90": latency.p90,
                    "rounds": latency.rounds,
                },
                "speedup": {
                    "median": ratio.median,
                    "p10": ratio.p10,
                    "p90": ratio.p90,
                    "verdict": ratio.verdict,
                },
            }
        )
    return rows


def _ours(folder: Path) -> bool:
    return (
        (folder / MANIFEST).is_file()
        or (folder / STAGING).is_dir()
        or (folder / "run.json").is_file()
        or (folder / "work").is_dir()
    )


def _deployed_files(deployed: Deployed) -> dict[str, bytes]:
    files = {PROGRAM: deployed.program()}
    files |= {f"model{suffix}": data for suffix, data in deployed.files.items()}
    arrays = {f"in{index:03d}": _array(leaf) for index, leaf in enumerate(deployed.example)}
    outputs = deployed.run(deployed.example)
    arrays |= {f"out{index:03d}": _array(leaf) for index, leaf in enumerate(outputs)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return files | {"example.npz": buffer.getvalue(), "bench.py": BENCH.read_bytes()}


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu().contiguous()
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16 and smaller floats, which numpy has not; float32 holds them exactly
        return tensor.float().numpy()


def _recaptured(opened: Opened, spec: Spec, example: list[Tensor]) -> Captured:
    """What a runtime without files compiles from: the saved program."""
    return Captured(
        program=load_program(io.BytesIO(opened.read(PROGRAM))),
        names=tuple(spec.kinds),
        inputs=spec.inputs,
        outputs=spec.outputs,
        classes={},
        example=build(spec.inputs, example),
        batch_axis=spec.batch_axis,
    )
