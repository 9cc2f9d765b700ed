"""Finished stages of a run in folders, each bound to the run's key; a stage that does not fit is made again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MaxLen
from torch import Tensor, nn
from typing_extensions import TypedDict

from torchslim.artifact.assembled import AnyDeployed, DeployedParts, pieces
from torchslim.artifact.loading import PROGRAM, load_opened
from torchslim.artifact.manifest import PARTS, part_folders
from torchslim.artifact.opened import Opened, open_artifact
from torchslim.artifact.storage import write_artifact
from torchslim.core import distributed
from torchslim.core.files import TEMPORARY, clean_temporaries, digest, present, remove, write_bytes, write_json
from torchslim.core.fingerprint import canonical
from torchslim.core.folder_lock import holding
from torchslim.core.hardware import instruction_set
from torchslim.core.isolation import copy_model, warn
from torchslim.core.parts import WHOLE, mounted, part_at, signature_of
from torchslim.core.schema import Schema
from torchslim.core.seals import is_sealed, key_id, own_secret, seal
from torchslim.core.step import DependsOnMore, Event, Form, Inputs, Step
from torchslim.errors import StorageError, TorchslimError
from torchslim.graph.export import capture, module_of
from torchslim.graph.io_structure import build
from torchslim.quantize import QuantizedModule
from torchslim.report.records import StageRow, strict
from torchslim.runtimes import Deployed, find_runtime
from torchslim.runtimes.bucketed import Bucketed
from torchslim.runtimes.pt2 import load_program, pack_program

COMMIT = "stage.json"  # written last: a stage folder that contains it is complete
AGAIN = "the step is run again"

Digest = Annotated[str, MaxLen(64)]


@strict
class Record(TypedDict):
    """Content of `stage.json`; `artifact` is the digest of the manifest beside it, which holds the hashes of all files.

    `seal` binds all other entries to the run's key. `own` also binds the artifact to this user on this machine; it is
    empty where no secret can be stored.
    """

    format: Literal["torchslim-stage"]
    version: Literal[1]
    key_id: Digest
    artifact: Digest
    row: StageRow | None
    own: Digest
    seal: Digest


RECORD: Schema[Record] = Schema(Record, COMMIT, StorageError, mend=AGAIN)


@dataclass(kw_only=True)
class Stage:
    """The model after a step (or before the first step), deployed and measured.

    `module` is the last trainable model: `model` itself, or the model before it where `model` is quantized.
    """

    name: str
    folder: Path
    model: nn.Module
    module: nn.Module
    masks: Mapping[str, Tensor]
    deployed: AnyDeployed
    row: dict[str, Any]

    def keep(self, key: str) -> None:
        """Write the stage to its folder, replacing the files of an earlier run."""
        module = None if isinstance(self.model, QuantizedModule) else self.module
        graphs = packed_graphs(self.model, self.deployed)
        keep(self.folder, key, module=module, masks=self.masks, deployed=self.deployed, row=self.row, graphs=graphs)


def stage_key(before: str, step: Step, steps: Sequence[Step], seed: int) -> str:
    """Digest of all that a step's result depends on: the stage before, the step, the seed, any `cache_inputs`."""
    more = step.cache_inputs(steps) if isinstance(step, DependsOnMore) else ()
    return digest(before, canonical(step), seed, *more)


def keep(
    folder: Path,
    key: str,
    *,
    module: nn.Module | None,
    masks: Mapping[str, Tensor],
    deployed: AnyDeployed | None = None,
    row: Mapping[str, Any] | None = None,
    graphs: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model to a stage's folder, replacing its contents."""
    remove(folder)
    artifact = write_artifact(folder, deployed=deployed, module=module, masks=masks, extra=graphs)
    record: dict[str, Any] = {
        "format": "torchslim-stage",
        "version": 1,
        "key_id": key_id(key),
        "artifact": artifact,
        "row": None if row is None else dict(row),
        "own": _own(key, artifact),
    }
    record = json.loads(json.dumps(record, allow_nan=False))  # as `kept` reads it: keys of evidence may be numbers
    write_json(folder / COMMIT, record | {"seal": seal(key, record)})


def _own(key: str, artifact: str) -> str:
    secret = own_secret()
    return "" if secret is None else seal(secret, "made here", key, artifact)


@dataclass(frozen=True, slots=True)
class Kept:
    """A checked stage folder: its files are those that were written under the key."""

    opened: Opened
    row: dict[str, Any] | None
    own: bool  # made by this user on this machine


def kept(folder: Path, key: str) -> Kept | None:
    """Read what `keep` wrote to a folder under this key; None where there is no such stage.

    Warns where the stage is damaged, or was written by a run with other weights, data or steps.
    """
    path = folder / COMMIT
    if not present(path):
        return None  # no stage, or one that a killed run has not finished writing
    try:
        record = RECORD.read(path)
        if record["key_id"] != key_id(key):
            raise StorageError(
                f"{folder} holds a step of a run with other weights, data, settings or another version of torchslim"
            )
        if not is_sealed(record["seal"], key, {name: value for name, value in record.items() if name != "seal"}):
            raise StorageError(f"{path} was changed since it was written")
        opened = open_artifact(folder)
        if opened.manifest["digest"] != record["artifact"]:
            raise StorageError(f"the files in {folder} are not those that were written with {path.name}")
    except TorchslimError as error:
        taken_again(error)
        return None
    row: Any = record["row"]
    return Kept(opened, row, own=record["own"] != "" and record["own"] == _own(key, record["artifact"]))


def taken_again(error: Exception) -> None:
    """Warn that a step runs again, since its stored files cannot be used."""
    if distributed.is_first():
        warn(f"{str(error).removesuffix(AGAIN).rstrip('; ')}; {AGAIN}")


def restored(
    folder: Path,
    key: str,
    form: Form,
    module: nn.Module,
    model: nn.Module,
    classes: dict[str, type],
    runtime: str,
    example: Inputs | None = None,
    part_examples: Mapping[str, Sequence[Inputs]] | None = None,
) -> Stage | None:
    """Load the stage that an earlier run finished under this key, if it is complete.

    Args:
        folder: folder of the stage.
        key: digest of what the stage depends on; see `stage_key`.
        form: form of the model that the step produces.
        module: trainable model of the stage before; a copy of it loses the channels that the step removed.
        model: model of the stage before.
        classes: classes of the model's outputs, by name.
        runtime: the run's runtime; files of another runtime are not loaded, and machine code only if this user made it
            on this machine.
        example, part_examples: inputs of calls of the whole model and of its parts, where parts are deployed.
    """
    stage_files = kept(folder, key)
    if stage_files is None or stage_files.row is None:
        return None
    opened = stage_files.opened
    try:
        places = opened.programs()
        if any(one.manifest.get("runtime") != runtime for place in places.values() for one in place.sizes()):
            raise StorageError(f"{folder} was made for another runtime than {runtime!r}")
        # machine code from elsewhere is never loaded: the program beside it is compiled again
        native, own = find_runtime(runtime).native, stage_files.own
        loaded = {
            path: load_opened(place, trusted=own, compiled_again=native and not (own and _for_this_processor(place)))
            for path, place in places.items()
        }
        for piece in loaded.values():
            piece.program = replace(piece.program, classes=classes)
        if form is Form.QUANTIZED:
            graphs = {
                name: _graph(opened.read(_graph_file(loaded, name)), piece, part_at(model, name))
                for name, piece in loaded.items()
            }
            if WHOLE not in graphs:
                module = opened.into(copy_model(module)[0])
            current: nn.Module = mounted(module if WHOLE in graphs else copy_model(module)[0], graphs)
        else:
            current = module = opened.into(copy_model(module)[0])
        deployed = loaded[WHOLE] if WHOLE in loaded else DeployedParts(current, loaded, example, part_examples)
        masks = opened.masks()
    except (TorchslimError, KeyError, ValueError, TypeError, RuntimeError) as error:
        # the files are intact but do not fit: a custom step changed the architecture, for example
        taken_again(StorageError(f"{folder} cannot be resumed from: {error}"))
        return None
    return Stage(
        name=stage_files.row["name"],
        folder=folder,
        model=current,
        module=module,
        masks=masks,
        deployed=deployed,
        row=stage_files.row,
    )


def packed_graphs(model: nn.Module, deployed: AnyDeployed) -> dict[str, bytes]:
    """Quantized graphs that leave the listed sizes free, by file; a program for each size does not tell them."""
    graphs: dict[str, bytes] = {}
    own = pieces(deployed)
    for name, piece in own.items():
        graph = part_at(model, name)
        if isinstance(piece, Bucketed) and isinstance(graph, QuantizedModule):
            examples: list[Inputs] = [build(program.spec.inputs, program.example) for program in piece.programs]
            graphs[_graph_file(own, name)] = pack_program(capture(graph, examples).program)
    return graphs


def _graph_file(deployed: Mapping[str, Deployed], name: str) -> str:
    """The file in a stage's artifact from which the graph of a program is read."""
    file = "graph.pt2" if isinstance(deployed[name], Bucketed) else PROGRAM
    return f"{PARTS}/{part_folders(deployed)[name]}/{file}" if name else file


def _graph(data: bytes, deployed: Deployed, model: nn.Module) -> QuantizedModule:
    """The quantized graph in a stored program, called like `model`."""
    program, spec = module_of(load_program(io.BytesIO(data))), deployed.spec
    return QuantizedModule(
        program,
        signature_of(model),
        spec.inputs,
        spec.outputs,
        deployed.program.classes,
        input_sizes=spec.input_sizes,
    )


@contextmanager
def alone(folder: Path, waiting: Callable[[Event], None] | None) -> Iterator[None]:
    """Lock a stage's folder that several runs share; the other runs report that they wait, and then find it finished.

    Without `waiting` the folder belongs to one run, which has already locked its working folder.
    """
    if waiting is None or not distributed.is_first():
        yield
        return
    with holding(folder.with_name(f"{folder.name}.lock"), lambda who: waiting(Event(step="stage", phase=who))):
        yield


def _for_this_processor(opened: Opened) -> bool:
    return all(one.manifest["spec"]["instruction_set"] == instruction_set() for one in opened.sizes())


@contextmanager
def state_folder(folder: Path, key: str) -> Iterator[Path]:
    """Open the folder for a step's checkpoints, beside its stage's; it is deleted after the block unless that fails.

    Checkpoints of another key are deleted first.
    """
    state = folder.with_name(f"{folder.name}.state")
    if distributed.is_first():
        _begin_state(state, key)
    distributed.wait()
    yield state
    if distributed.is_first():
        remove(state)
    distributed.wait()


def _begin_state(state: Path, key: str) -> None:
    path, name = state / "key", key_id(key).encode()
    if state.is_symlink() or (state.exists() and not state.is_dir()):
        remove(state)
    elif state.is_dir() and not (path.is_file() and _read(path) == name):
        if any(not entry.name.startswith(TEMPORARY) for entry in state.iterdir()):
            taken_again(StorageError(f"the checkpoints in {state} are damaged, or of a run with other weights or data"))
        remove(state)
    if not path.exists():
        write_bytes(path, name)
    clean_temporaries(state)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
