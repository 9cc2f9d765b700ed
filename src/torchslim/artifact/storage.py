"""Save and load artifacts: weights as safetensors, programs beside them, the rest JSON, every file hashed.

artifact.json         format version, runtime, how the model is called, SHA-256 of every other file
model.onnx, .xml ...  the runtime's file or files, and the exported program, model.pt2
weights.safetensors   the module's state, for `load_module`; masks.safetensors: packed bits
surgery.json          which channels were removed from the module that the factory makes
example.npz           example inputs and the outputs they gave; of the median and of the largest size where sizes vary
bench.py              times the model where torchslim is not installed
parts/PART/           of a model with deployed parts: the artifact of each part
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchslim.artifact.assembled import AnyDeployed, DeployedParts, pieces
from torchslim.artifact.deployment import alike, new_notes, verified
from torchslim.artifact.latency import Timings
from torchslim.artifact.loading import PROGRAM, load_opened, opened_for_loading
from torchslim.artifact.manifest import FORMAT, PARTS, VERSION, checked_manifest, manifest_digest, part_folders
from torchslim.artifact.opened import LARGEST, MASKS, SURGERY, WEIGHTS
from torchslim.artifact.signing import Key, sign
from torchslim.artifact.state import pack_masks, pack_state, pack_surgery
from torchslim.artifact.writing import MANIFEST, replace_files
from torchslim.core.arguments import checks_arguments
from torchslim.core.files import json_bytes
from torchslim.core.hardware import describe_machine
from torchslim.core.isolation import warn
from torchslim.core.parts import unmounted
from torchslim.core.step import Inputs
from torchslim.core.usable import usable
from torchslim.errors import ArtifactError
from torchslim.quantize.modules import is_quantized
from torchslim.runtimes import Deployed, find_runtime
from torchslim.runtimes.base import as_array
from torchslim.runtimes.bucketed import Bucketed
from torchslim.runtimes.pt2 import operators_of

BENCH = Path(__file__).parent / "bench_script.py"


@checks_arguments(ArtifactError)
def save(
    model: nn.Module | AnyDeployed,
    folder: str | Path,
    *,
    example_inputs: Inputs | None = None,
    masks: Mapping[str, Tensor] | None = None,
    key: Key | None = None,
) -> Path:
    """Save a module or a deployed model.

    A module's weights are saved for `load_module`; with `example_inputs` its program is saved too, for `load`. A
    deployed model is saved with its runtime's file, and loads with `load`.

    Args:
        model: what to save. Of a model with deployed parts, the parts are saved, each as an artifact of its own in the
            folder `parts`, and the weights of the whole model.
        folder: a new or an empty one, or one that holds an artifact, which is replaced.
        example_inputs: inputs of the module, for saving its program.
        masks: masks of pruned weights, by parameter name.
        key: a private key of Ed25519 that signs the manifest, and so all files: the path or the bytes of a PEM file, or
            a key object of `cryptography`.

    Raises:
        ArtifactError: the folder holds something else, or `key` is no private key.
        StorageError: the disk is full; the artifact that was there before is kept.
    """
    if isinstance(model, Deployed):
        confirm(folder, model, write_artifact(folder, deployed=model, masks=masks, key=key))
        return Path(folder)
    if isinstance(model, DeployedParts):
        module = unmounted(model.model)
        confirm(folder, model, write_artifact(folder, deployed=model, module=module, masks=masks, key=key))
        return Path(folder)
    model = usable(model, ArtifactError)
    quantized = is_quantized(model)
    if example_inputs is None:
        if quantized:
            raise ArtifactError(
                "a quantized model can be saved only as a program; give example inputs: save(..., example_inputs=...)"
            )
        write_artifact(folder, module=model, masks=masks, key=key)
        return Path(folder)
    deployed = verified(model, lambda module: find_runtime("eager").compile(module, example_inputs))
    for note in new_notes(model, deployed):
        warn(note)
    write_artifact(folder, deployed=deployed, module=None if quantized else model, masks=masks, key=key)
    return Path(folder)


def confirm(folder: str | Path, deployed: AnyDeployed, digest: str) -> None:
    """Load a quantized model that was just written, and compare its outputs on the example with those of `deployed`.

    Args:
        folder: folder that the model was written to.
        deployed: the model that was written.
        digest: digest of its manifest. If another process has saved there since, that process confirms its artifact.

    Raises:
        ArtifactError: the outputs differ.
    """
    own = pieces(deployed)
    if not any(part.quantized and part.suffixes for part in own.values()):
        return
    opened = opened_for_loading(folder, None, None)
    if opened.manifest["digest"] != digest:
        return
    places = opened.programs()
    for path, part in own.items():
        if not part.quantized or not part.suffixes:
            continue
        loaded = load_opened(places[path], trusted=True)  # machine code was just written here
        if not alike(part, loaded):
            raise ArtifactError(
                f"the model saved to {folder} gives other outputs than before on {part.runtime!r}; save it "
                "for another runtime"
            )


def write_artifact(
    folder: str | Path,
    *,
    deployed: AnyDeployed | None = None,
    module: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, bytes] | None = None,
    key: Key | None = None,
) -> str:
    """Write an artifact to a folder, in place of the artifact that is there; other files in the folder stay.

    All files are written to a staging folder first and then renamed, the manifest last: on a full disk the old artifact
    is kept, and a folder that has a manifest is complete.

    Returns:
        The digest of the manifest, and so of the intended contents of all files.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; name a folder to save to")
    files, manifest = _contents(deployed, dict(extra or {}), module=module, masks=masks, key=key)
    replace_files(folder, files, manifest)
    return str(manifest["digest"])


def _contents(
    deployed: AnyDeployed | None,
    files: dict[str, bytes],
    *,
    module: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    key: Key | None = None,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files of an artifact, `files` included, and its manifest."""
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "machine": describe_machine()}
    parts = deployed.parts if isinstance(deployed, DeployedParts) else {}
    if isinstance(deployed, Bucketed):
        manifest["buckets"] = deployed.to_dict()
        parts = {str(number): program for number, program in enumerate(deployed.programs)}
    if parts:
        manifest["parts"] = part_folders(parts)
        for path, part in parts.items():
            inner, inner_manifest = _contents(part, {}, key=key)
            inner[MANIFEST] = json_bytes(inner_manifest)
            files |= {f"{PARTS}/{manifest['parts'][path]}/{name}": data for name, data in inner.items()}
    elif isinstance(deployed, Deployed):
        files |= _deployed_files(deployed)
        manifest |= {
            "runtime": deployed.runtime,
            "threads": deployed.threads,
            "spec": deployed.spec.to_dict(),
            "quantized": deployed.quantized,
        }
    if module is not None:
        files[WEIGHTS], manifest["aliases"], manifest["channels_last"] = pack_state(module)
        record = pack_surgery(module)
        if record is not None:
            files[SURGERY] = record
    if masks:
        files[MASKS], manifest["mask_shapes"] = pack_masks(masks)
    manifest["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    manifest["digest"] = manifest_digest(manifest)
    if key is not None:
        manifest["signature"] = sign(manifest["digest"], key)
    checked_manifest(manifest)  # a manifest that could not be read is not written
    return files, manifest


def render_timings(timings: Timings, first: str, largest: Timings | None = None) -> list[dict[str, Any]]:
    """Rows for `torchslim bench`: latency and speed-up over the first artifact, also at the largest size if timed."""
    rows = []
    for name in timings.rounds:
        row = {"artifact": name, **_timed(timings, name, first)}
        if largest is not None:
            row["largest"] = _timed(largest, name, first)
        rows.append(row)
    return rows


def _timed(timings: Timings, name: str, first: str) -> dict[str, Any]:
    latency, ratio = timings.latency(name), timings.speedup(name, first)
    return {
        "latency_ms": {"median": latency.value, "p10": latency.p10, "p90": latency.p90, "rounds": latency.rounds},
        "speedup": {"median": ratio.value, "p10": ratio.p10, "p90": ratio.p90, "verdict": ratio.verdict},
    }


def _deployed_files(deployed: Deployed) -> dict[str, bytes]:
    files = {PROGRAM: deployed.program.pack()}
    files |= {f"model{suffix}": data for suffix, data in deployed.files.items()}
    arrays: dict[str, Any] = {}
    for prefix, example in (("", deployed.example), (LARGEST, deployed.largest)):
        if example is not None:
            arrays |= {f"{prefix}in{index:03d}": as_array(leaf) for index, leaf in enumerate(example)}
            outputs = deployed.run(list(example))
            arrays |= {f"{prefix}out{index:03d}": as_array(leaf) for index, leaf in enumerate(outputs)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return files | {"example.npz": buffer.getvalue(), "bench.py": bench_script([files[PROGRAM]])}


def bench_script(programs: Iterable[bytes]) -> bytes:
    """The script that times the models of a folder; it may call only the operators that these programs have now."""
    operators = sorted({name for program in programs for name in operators_of(program)})
    text = BENCH.read_text()
    empty = "OPERATORS: tuple[str, ...] = ()"
    assert text.count(empty) == 1, "bench.py has one place for the operators"
    lines = "".join(f"    {name!r},\n" for name in operators)
    return text.replace(empty, f"OPERATORS: tuple[str, ...] = (\n{lines})" if operators else empty).encode()
