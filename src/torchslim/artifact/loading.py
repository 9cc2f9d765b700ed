"""Load artifacts: programs on their runtime, parts of a model, and modules with the saved weights."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from torchslim.artifact.assembled import DeployedParts
from torchslim.artifact.manifest import PARTS
from torchslim.artifact.opened import SURGERY, WEIGHTS, Opened, open_artifact
from torchslim.artifact.signing import Key
from torchslim.artifact.writing import MANIFEST
from torchslim.core.arguments import checks_arguments
from torchslim.core.files import bundle
from torchslim.core.folder_lock import reading
from torchslim.core.hardware import instruction_set
from torchslim.core.isolation import quiet
from torchslim.core.parts import WHOLE, select_parts
from torchslim.core.program_names import first_programs
from torchslim.core.schema import shorten
from torchslim.core.terminal import printable
from torchslim.core.usable import usable
from torchslim.errors import ArtifactError, TorchslimError
from torchslim.graph.export import Captured
from torchslim.graph.io_structure import build
from torchslim.runtimes import RUNTIMES, Deployed, Runtime, Spec, find_runtime
from torchslim.runtimes.base import Program
from torchslim.runtimes.bucketed import Bucketed
from torchslim.runtimes.pt2 import load_program

PROGRAM = "model.pt2"


@overload
def load(
    folder: str | Path,
    factory: None = None,
    *,
    part: str | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    trusted: bool = False,
    public_key: Key | None = None,
) -> Deployed: ...


@overload
def load(
    folder: str | Path,
    factory: Callable[[], nn.Module],
    *,
    part: str | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    trusted: bool = False,
    public_key: Key | None = None,
) -> DeployedParts: ...


@checks_arguments(ArtifactError)
def load(
    folder: str | Path,
    factory: Callable[[], nn.Module] | None = None,
    *,
    part: str | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    trusted: bool = False,
    public_key: Key | None = None,
) -> Deployed | DeployedParts:
    """Load a saved model for use; outputs are bitwise those of the model that was saved.

    Nothing is unpickled, and every file is checked against its SHA-256. With `runtime`, the saved program is
    compiled for another runtime than the one it was saved for.

    Args:
        folder: folder that `save` wrote.
        factory: for a model with deployed parts: makes the whole model as it was before compression, or of the pruned
            architecture; its weights are replaced by the saved ones, where the artifact has them. Returns the whole
            model with its parts on their runtime.
        part: path of the part to load alone; not needed where there is one.
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
    opened = opened_for_loading(folder, public_key, runtime)
    places = opened.programs()
    paths = [path for path in places if path != WHOLE]
    if not paths:
        if part is not None:
            opened.part(part)  # raises: there are no parts
        if factory is not None:
            raise ArtifactError(f"{folder} holds a whole model, which needs no factory; call ts.load(folder)")
        return load_opened(opened, runtime=runtime, threads=threads, trusted=trusted)
    if factory is not None and part is not None:
        raise ArtifactError("give factory for the whole model, or part for a part alone, not both")
    if factory is None:
        if part is None and len(first_programs(paths)) > 1:
            raise ArtifactError(
                f"{folder} holds the parts {', '.join(map(repr, first_programs(paths)))}; name one, part={paths[0]!r}, "
                "or give the factory of the whole model"
            )
        return load_opened(opened.part(part or paths[0]), runtime=runtime, threads=threads, trusted=trusted)
    module = usable(factory(), ArtifactError, "the factory's model")
    if WEIGHTS in opened.manifest["files"]:
        module = opened.into(module)
    select_parts(module, first_programs(paths))  # raises for a model without these parts
    parts = {
        path: load_opened(place, runtime=runtime, threads=threads, trusted=trusted) for path, place in places.items()
    }
    return DeployedParts(module, parts)


def load_pieces(
    folder: str | Path, *, threads: int | None = None, trusted: bool = False, public_key: Key | None = None
) -> dict[str, Deployed]:
    """The deployed programs of an artifact by the path of their part, "" for a whole model; see `load`."""
    places = opened_for_loading(folder, public_key, None).programs()
    return {path: load_opened(place, threads=threads, trusted=trusted) for path, place in places.items()}


def opened_for_loading(folder: str | Path, public_key: Key | None, runtime: str | None) -> Opened:
    """A checked artifact, with the files for loading in memory: another process may replace them meanwhile."""
    with reading(Path(folder)):
        opened = open_artifact(folder, public_key=public_key)
        opened.read_ahead(*_needed(opened, runtime))
        if "parts" in opened.manifest:
            opened.read_ahead(WEIGHTS, SURGERY)
    return opened


def _needed(opened: Opened, runtime: str | None) -> list[str]:
    """Names of the files from which programs are loaded, those of parts included."""
    manifest, names = opened.manifest, list[str]()
    for path, folder in manifest.get("parts", {}).items():
        names += [f"{PARTS}/{folder}/{name}" for name in (MANIFEST, *_needed(opened.part(path), runtime))]
    if names:
        return names
    own = manifest.get("runtime")
    stored = own is not None and own in RUNTIMES and runtime in (None, own)
    files = [f"model{suffix}" for suffix in find_runtime(str(own)).suffixes] if stored else []
    return ["example.npz", *(files or [PROGRAM])]


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
    if "buckets" in manifest:
        options: dict[str, Any] = {"threads": threads, "trusted": trusted, "compiled_again": compiled_again}
        programs = [load_opened(opened.part(path), runtime=runtime, **options) for path in manifest["parts"]]
        return Bucketed.from_dict(programs, manifest["buckets"], find_runtime(programs[0].runtime))
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
    example, largest = opened.examples()
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
    program = Program(
        spec=spec,
        example=example,
        largest=largest,
        pack=lambda: opened.read(PROGRAM),
        quantized=manifest["quantized"],
    )
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
