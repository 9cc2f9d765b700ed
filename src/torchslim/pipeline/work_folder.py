"""The working folder of a run, which belongs to one recipe and to one process at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchslim.core import distributed
from torchslim.core.files import TEMPORARY, clean_temporaries, present, write_json
from torchslim.core.folder_lock import LOCK, holding
from torchslim.core.isolation import warn
from torchslim.core.schema import Schema
from torchslim.core.step import Event
from torchslim.errors import RecipeError, StorageError
from torchslim.report.records import RecipeOf

RECIPE = "recipe.json"
SHARED_SECONDS = 3600.0  # no write takes that long: an older temporary file was left by a killed process

KNOWN: Schema[dict[str, Any]] = Schema(RecipeOf, RECIPE, StorageError)


@contextmanager
def working_in(
    folder: Path, recipe: Mapping[str, Any], overwrite: bool, waiting: Callable[[Event], None] | None = None
) -> Iterator[None]:
    """Lock a run's folder while the block runs: one lock for all processes of one training.

    Args:
        folder: a new folder, an empty one, or that of an earlier run.
        recipe: the run's recipe; the folder of another recipe is refused.
        overwrite: use the folder of another recipe.
        waiting: called while another process holds the folder, and the run waits; None: raise an error instead.

    Raises:
        RecipeError: the folder holds another recipe's run, or files that torchslim did not write.
        StorageError: another process holds the folder, or it cannot be written.
    """
    if not distributed.is_first():
        distributed.wait()
        yield
        return
    own(folder, RecipeError, "run", lambda: _read(folder) is not None)
    with holding(folder / LOCK, None if waiting is None else lambda who: waiting(Event(step="folder", phase=who))):
        clean_temporaries(folder)
        claim(folder, recipe, overwrite)
        distributed.wait()
        yield


def own(
    folder: Path, error: type[RecipeError], whose: str, known: Callable[[], bool], spared: tuple[str, ...] = ()
) -> None:
    """Refuse a folder that holds files and was never marked as torchslim's.

    Args:
        error: type of the error to raise.
        whose: what writes such folders, in words, for the message.
        known: returns whether the folder is torchslim's by other evidence: a copy may lack the mark, a hidden file.
        spared: names, or beginnings of names, of files that are allowed in the folder.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise error(f"{folder} is a file; name a folder")
        if (folder / LOCK).is_file() or not folder.is_dir():
            return
        foreign = [path.name for path in folder.iterdir() if not path.name.startswith((TEMPORARY, *spared))]
    except OSError as failure:
        raise StorageError(f"{folder} cannot be read: {failure.strerror or failure}; name another folder") from failure
    if foreign and not known():
        raise error(f"{folder} holds files that no {whose} of torchslim left there; choose another folder")


def claim(folder: Path, recipe: Mapping[str, Any], overwrite: bool) -> None:
    """Store the recipe in its folder, and refuse a folder of another recipe unless `overwrite` is set."""
    path, new = folder / RECIPE, json.loads(json.dumps(recipe))
    if present(path):
        old = _read(folder)
        if old is None:
            warn(f"{path} is damaged and written again; finished steps of this recipe are reused")
        elif old != new and not overwrite:
            raise RecipeError(
                f"{folder} holds the run of another recipe ({_what_differs(old, new)}); choose another folder, or "
                "run with overwrite to replace it"
            )
        if old == new:
            return
    write_json(path, recipe)


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        return KNOWN.read(folder / RECIPE)
    except StorageError:
        return None


def _what_differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if len(old["steps"]) != len(new["steps"]):
        return f"{len(old['steps'])} steps there, {len(new['steps'])} here"
    for index, (a, b) in enumerate(zip(old["steps"], new["steps"], strict=True), 1):
        if not (isinstance(a, dict) and isinstance(b, dict)):
            if a != b:
                return f"step {index}"
            continue
        for key in {**a, **b}:
            if a.get(key) != b.get(key):
                return f"step {index}, {key}: {_short(a.get(key))} there, {_short(b.get(key))} here"
    keys = [key for key in ("model", "task", "target", "seed") if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} here" for key in keys)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
