"""Save and load artifacts: weights as safetensors, programs beside them, the rest JSON, every file hashed.

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
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchslim.artifact.deployment import alike, new_notes, verified
from torchslim.artifact.latency import Timings
from torchslim.artifact.manifest import FORMAT, VERSION, checked_manifest, manifest_digest
from torchslim.artifact.opened import MASKS, SURGERY, WEIGHTS, Opened, open_artifact
from torchslim.artifact.signing import Key, sign
from torchslim.artifact.state import pack_masks, pack_state, pack_surgery
from torchslim.artifact.writing import replace_files
from torchslim.core.arguments import checks_arguments
from torchslim.core.files import bundle
from torchslim.core.folder_lock import reading
from torchslim.core.hardware import describe_machine, instruction_set
from torchslim.core.isolation import quiet, warn
from torchslim.core.schema import shorten
from torchslim.core.step import Inputs
from torchslim.core.terminal import printable
from torchslim.core.usable import usable
from torchslim.errors import ArtifactError, TorchslimError
from torchslim.graph.export import Captured
from torchslim.graph.io_structure import build
from torchslim.quantize import QuantizedModule
from torchslim.runtimes import RUNTIMES, Deployed, Runtime, Spec, find_runtime
from torchslim.runtimes.base import Program, as_array
from torchslim.runtimes.pt2 import load_program, operators_of

PROGRAM = "model.pt2"
BENCH = Path(__file__).parent / "bench_script.py"


@checks_arguments(ArtifactError)
def save(
    model: nn.Module | Deployed,
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
        model: what to save.
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
    model = usable(model, ArtifactError)
    quantized = any(isinstance(module, QuantizedModule) for module in model.modules())
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


def confirm(folder: str | Path, deployed: Deployed, digest: str) -> None:
    """Load a quantized model that was just written, and compare its outputs on the example with those of `deployed`.

    Args:
        folder: folder that the model was written to.
        deployed: the model that was written.
        digest: digest of its manifest. If another process has saved there since, that process confirms its artifact.

    Raises:
        ArtifactError: the outputs differ.
    """
    if not deployed.quantized or not deployed.suffixes:
        return
    opened = _opened(folder, None, None)
    if opened.manifest["digest"] != digest:
        return
    loaded = load_opened(opened, trusted=True)  # machine code in it was just written here
    if not alike(deployed, loaded):
        raise ArtifactError(
            f"the model saved to {folder} gives other outputs than before on {deployed.runtime!r}; save it "
            "for another runtime"
        )


def write_artifact(
    folder: str | Path,
    *,
    deployed: Deployed | None = None,
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
    files: dict[str, bytes] = dict(extra or {})
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "machine": describe_machine()}
    if deployed is not None:
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
    replace_files(folder, files, manifest)
    return str(manifest["digest"])


@checks_arguments(ArtifactError)
def load(
    folder: str | Path,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    trusted: bool = False,
    public_key: Key | None = None,
) -> Deployed:
    """Load a saved model for use; outputs are bitwise those of the model that was saved.

    Nothing is unpickled, and every file is checked against its SHA-256. With `runtime`, the saved program is
    compiled for another runtime than the one it was saved for.

    Args:
        folder: folder that `save` wrote.
        runtime: None takes the one that it was saved for.
        threads: None takes those that it was saved with.
        trusted: load machine code too (runtime "aoti"), which can do on this machine whatever you can. A model of
            OpenVINO is then not tried in a child process first.
        public_key: refuse an artifact that was not signed with the private key of this one: the path or the bytes of a
            PEM file, or a key object of `cryptography`. None takes unsigned artifacts too, and checks no signature.

    Raises:
        ArtifactError: no artifact, a newer format, a changed or missing file, nothing that runs, machine code that is
            not trusted, or one that is not signed by the key.
        RuntimeUnavailable: the artifact's runtime is not installed.
    """
    opened = _opened(folder, public_key, runtime)
    return load_opened(opened, runtime=runtime, threads=threads, trusted=trusted)


def _opened(folder: str | Path, public_key: Key | None, runtime: str | None) -> Opened:
    """A checked artifact, with the files for loading in memory: another process may replace them meanwhile."""
    with reading(Path(folder)):
        opened = open_artifact(folder, public_key=public_key)
        own = opened.manifest.get("runtime")
        stored = own is not None and own in RUNTIMES and runtime in (None, own)
        files = [f"model{suffix}" for suffix in find_runtime(str(own)).suffixes] if stored else []
        opened.read_ahead("example.npz", *(files or [PROGRAM]))
    return opened


def load_opened(
    opened: Opened,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    trusted: bool = False,
    compiled_again: bool = False,
) -> Deployed:
    """`load` for an opened artifact; `compiled_again` compiles its program instead of reading the runtime's files."""
    folder, manifest = opened.folder, opened.manifest
    if "spec" not in manifest:
        raise ArtifactError(f"{folder} holds weights only; rebuild the model with ts.load_module(folder, factory)")
    spec = Spec(**manifest["spec"])
    if runtime is None and manifest["runtime"] not in RUNTIMES:
        raise ArtifactError(
            f"{folder} was saved for the runtime {shorten(manifest['runtime'])}, which this torchslim does not have; "
            "name another: ts.load(..., runtime=...)"
        )
    chosen = find_runtime(runtime or manifest["runtime"])
    stored = chosen.read is not None and chosen.name == manifest["runtime"] and not compiled_again
    if stored and chosen.native:
        _check_native(folder, spec, trusted)
    if manifest["quantized"] and spec.instruction_set != instruction_set():
        warnings.warn(
            f"{folder} was quantized for {printable(spec.instruction_set)}, this machine has {instruction_set()}: int8 "
            "may be slower here, and without VNNI less accurate; quantize again on such a machine",
            stacklevel=3,
        )
    threads = threads or manifest["threads"]
    example = opened.example()
    payload: bytes | None = None
    with quiet():
        try:
            if chosen.read is not None and stored:
                payload = _checked_payload(opened, chosen, trusted, example)
                session = chosen.read(payload, spec, threads)
            else:
                session, payload = chosen.make(_recaptured(opened, spec, example), spec, threads)
        except TorchslimError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{folder} cannot be loaded on runtime {chosen.name!r}: {type(error).__name__}: {str(error)[:300]}; "
                "save the model again"
            ) from error
    program = Program(spec=spec, example=example, pack=lambda: opened.read(PROGRAM), quantized=manifest["quantized"])
    return Deployed(session, program, chosen, threads=threads, payload=payload)


def _checked_payload(opened: Opened, runtime: Runtime, trusted: bool, example: Sequence[Tensor]) -> bytes:
    """Bytes of the runtime's files, checked, and tried in a child process first if the runtime may crash on them."""
    files = {suffix: opened.read(f"model{suffix}") for suffix in runtime.suffixes}
    if runtime.check is not None:
        runtime.check(files)
    if runtime.trial is not None and not (trusted or opened.signed):
        runtime.trial(files, example)
    return bundle(files) if runtime.beside else next(iter(files.values()))


def _check_native(folder: str | Path, spec: Spec, trusted: bool) -> None:
    """Raise ArtifactError for machine code that is not trusted, or that is for another instruction set."""
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


@checks_arguments(ArtifactError)
def load_module(folder: str | Path, factory: Callable[[], nn.Module], *, public_key: Key | None = None) -> nn.Module:
    """A module from `factory` with the saved weights, in their saved precision.

    Args:
        folder: folder that `save` wrote.
        factory: makes the model as it was before channels were pruned, whose channels are then removed again, or a
            model of the pruned architecture. Its weights do not matter, and the returned model may be modified.
        public_key: as for `load`.

    Raises:
        ArtifactError: the factory's model has other parameters than the saved one; names them.
    """
    with reading(Path(folder)):
        opened = open_artifact(folder, public_key=public_key)
        opened.read_ahead(WEIGHTS, SURGERY)
    return opened.into(factory())


def render_timings(timings: Timings, first: str) -> list[dict[str, Any]]:
    """Rows for `torchslim bench`: latency and speed-up over the first artifact."""
    rows = []
    for name in timings.rounds:
        latency, ratio = timings.latency(name), timings.speedup(name, first)
        rows.append(
            {
                "artifact": name,
                "latency_ms": {
                    "median": latency.value,
                    "p10": latency.p10,
                    "p90": latency.p90,
                    "rounds": latency.rounds,
                },
                "speedup": {
                    "median": ratio.value,
                    "p10": ratio.p10,
                    "p90": ratio.p90,
                    "verdict": ratio.verdict,
                },
            }
        )
    return rows


def _deployed_files(deployed: Deployed) -> dict[str, bytes]:
    files = {PROGRAM: deployed.program.pack()}
    files |= {f"model{suffix}": data for suffix, data in deployed.files.items()}
    arrays = {f"in{index:03d}": as_array(leaf) for index, leaf in enumerate(deployed.example)}
    outputs = deployed.run(deployed.example)
    arrays |= {f"out{index:03d}": as_array(leaf) for index, leaf in enumerate(outputs)}
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


def _recaptured(opened: Opened, spec: Spec, example: list[Tensor]) -> Captured:
    """The saved program in the form that a runtime compiles."""
    return Captured(
        program=load_program(io.BytesIO(opened.read(PROGRAM))),
        names=tuple(spec.kinds),
        inputs=spec.inputs,
        outputs=spec.outputs,
        classes={},
        example=build(spec.inputs, example),
        given=build(spec.inputs, example),
        batch_axis=spec.batch_axis,
    )
