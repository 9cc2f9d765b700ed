"""Finished stages of a run, kept in folders: each is bound to the run's key, and what does not fit is taken again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MaxLen
from torch import Tensor, nn
from typing_extensions import TypedDict

from torchslim.artifact.opened import Opened, open_artifact
from torchslim.artifact.storage import load_opened, write_artifact
from torchslim.core import distributed
from torchslim.core.files import TEMPORARY, clean_temporaries, digest, present, remove, write_bytes, write_json
from torchslim.core.fingerprint import canonical
from torchslim.core.folder_lock import holding
from torchslim.core.hardware import instruction_set
from torchslim.core.isolation import copy_model, warn
from torchslim.core.schema import Schema
from torchslim.core.seals import is_sealed, key_id, own_secret, seal
from torchslim.core.step import DependsOnMore, Event, Form, Step
from torchslim.errors import StorageError, TorchslimError
from torchslim.graph.calling import signature_of
from torchslim.quantize import QuantizedModule
from torchslim.report.records import STRICT, StageRow
from torchslim.runtimes import Deployed, find_runtime
from torchslim.runtimes.pt2 import load_program

COMMIT = "stage.json"  # written last: a stage folder that has it is whole
AGAIN = "the step is taken again"

Digest = Annotated[str, MaxLen(64)]


class Record(TypedDict):
    """A `stage.json`. `artifact` is the digest of the manifest beside it, which holds the hashes of all files.

    `seal` binds all other entries to the run's key; `own` binds the artifact to this user on this machine, too, and is
    empty where no secret can be kept.
    """

    __pydantic_config__ = STRICT  # type: ignore[misc]

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
    """The model after a step (or before the first), deployed and measured.

    `module` is the last trainable model: `model` itself, or where that is quantized, the one before.
    """

    name: str
    folder: Path
    model: nn.Module
    module: nn.Module
    masks: Mapping[str, Tensor]
    deployed: Deployed
    row: dict[str, Any]

    def keep(self, key: str) -> None:
        """Write the stage to its folder, in the place of what an earlier run left there."""
        module = None if isinstance(self.model, QuantizedModule) else self.model
        keep(self.folder, key, module=module, masks=self.masks, deployed=self.deployed, row=self.row)


def stage_key(before: str, step: Step, steps: Sequence[Step], seed: int) -> str:
    """What a step's result depends on: what it was made from, the step, and, where it measures what ships, the rest."""
    more = step.cache_inputs(steps) if isinstance(step, DependsOnMore) else ()
    return digest(before, canonical(step), seed, *more)


def keep(
    folder: Path,
    key: str,
    *,
    module: nn.Module | None,
    masks: Mapping[str, Tensor],
    deployed: Deployed | None = None,
    row: Mapping[str, Any] | None = None,
) -> None:
    """Write a model to a stage's folder, in the place of what stands there."""
    remove(folder)
    artifact = write_artifact(folder, deployed=deployed, module=module, masks=masks)
    record: dict[str, Any] = {
        "format": "torchslim-stage",
        "version": 1,
        "key_id": key_id(key),
        "artifact": artifact,
        "row": None if row is None else dict(row),
        "own": _own(key, artifact),
    }
    record = json.loads(json.dumps(record, allow_nan=False))  # as it is read back: keys of evidence may be numbers
    write_json(folder / COMMIT, record | {"seal": seal(key, record)})


def _own(key: str, artifact: str) -> str:
    secret = own_secret()
    return "" if secret is None else seal(secret, "made here", key, artifact)


@dataclass(frozen=True, slots=True)
class Kept:
    """A stage's folder that was checked: its files are those that were written under this key."""

    opened: Opened
    row: dict[str, Any] | None
    own: bool  # it was made by this user on this machine


def kept(folder: Path, key: str) -> Kept | None:
    """What `keep` wrote to a folder under this key; None where nothing is, with a warning where it is damaged.

    The warning says so, too, where another run's stage stands in the place, one of other weights, data or steps.
    """
    path = folder / COMMIT
    if not present(path):
        return None  # nothing, or what a killed run has begun to write
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
    """Warn that a step cannot be taken up from what is kept of it."""
    if distributed.is_first():
        warn(f"{str(error).removesuffix(AGAIN).rstrip('; ')}; {AGAIN}")


def restored(
    folder: Path, key: str, form: Form, module: nn.Module, model: nn.Module, classes: dict[str, type], runtime: str
) -> Stage | None:
    """The stage that an earlier run finished, if it is this one and whole.

    Args:
        folder: where it was kept.
        key: says what it was made from.
        form: what its step gives.
        module: of the stage before, from which it is made again: channels that its step removed are removed once more.
        model: of the stage before.
        classes: of the model's outputs, by name.
        runtime: of the run; files of no other runtime are loaded, and machine code only where this user made it here.
    """
    found = kept(folder, key)
    if found is None or found.row is None:
        return None
    opened = found.opened
    try:
        if opened.manifest.get("runtime") != runtime:
            raise StorageError(f"{folder} was made for another runtime than {runtime!r}")
        # machine code of others is never loaded: the program beside it is compiled again
        strange = find_runtime(runtime).native and not (found.own and _for_this_processor(opened))
        deployed = load_opened(opened, trusted=found.own, compiled_again=strange)
        deployed.classes = classes
        if form is Form.QUANTIZED:
            program = load_program(io.BytesIO(opened.read("model.pt2"))).module()
            spec = deployed.spec
            made: nn.Module = QuantizedModule(program, signature_of(model), spec.inputs, spec.outputs, classes)
        else:
            made = module = opened.into(copy_model(module)[0])
        masks = opened.masks()
    except (TorchslimError, KeyError, ValueError, TypeError, RuntimeError) as error:
        # the files are those that were written: a step of the user's own changed the architecture, for example
        taken_again(StorageError(f"{folder} cannot be taken up: {error}"))
        return None
    return Stage(
        name=found.row["name"], folder=folder, model=made, module=module, masks=masks, deployed=deployed, row=found.row
    )


@contextmanager
def alone(folder: Path, waiting: Callable[[Event], None] | None) -> Iterator[None]:
    """Hold a stage's folder that several runs may want; the others wait, say so, and find the stage finished.

    Without `waiting` the folder belongs to one run, whose working folder is held already.
    """
    if waiting is None or not distributed.is_first():
        yield
        return
    with holding(folder.with_name(f"{folder.name}.lock"), lambda who: waiting(Event(step="stage", phase=who))):
        yield


def _for_this_processor(opened: Opened) -> bool:
    spec = opened.manifest.get("spec")
    return isinstance(spec, Mapping) and spec.get("instruction_set") == instruction_set()


@contextmanager
def state_folder(folder: Path, key: str) -> Iterator[Path]:
    """The folder beside a stage's in which its step keeps checkpoints; gone after the block, unless that fails.

    What another key left in it is deleted first.
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
        if any(not each.name.startswith(TEMPORARY) for each in state.iterdir()):
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
