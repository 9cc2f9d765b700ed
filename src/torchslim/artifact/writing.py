"""Write an artifact's files to a folder, in place of the files of the artifact there and of no others.

All files are written to a staging folder first and then renamed, the manifest last: on a full disk the old artifact is
kept, and a folder that has a manifest is complete. A file is deleted only if the old manifest has its name and hash; a
manifest that names other files, or places outside of its folder, is not trusted.
"""

from __future__ import annotations

import re
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchslim.artifact.manifest import LIMITS, PARTS, parse_manifest
from torchslim.core.files import TEMPORARY, sha256, write_bytes, write_json
from torchslim.core.folder_lock import writing
from torchslim.core.schema import read_file
from torchslim.errors import ArtifactError, StorageError

MANIFEST = "artifact.json"
STAGING = ".saving"
OURS = re.compile(
    r"artifact\.json|model(\.aoti)?\.(pt2|onnx|xml|bin|pte)|graph\.pt2|(weights|masks)\.safetensors|surgery\.json|example\.npz|"
    rf"bench\.py|run\.json|report\.html|{re.escape(TEMPORARY)}.*"
)
"""Names of the files that an interrupted save may leave in its staging folder."""


def replace_files(folder: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Put `files` and their manifest into a folder.

    Other processes that save or read there wait until this is done.

    Raises:
        ArtifactError: the folder holds something else.
        StorageError: the disk is full, or another process is saving there; the artifact that was there before is kept.
    """
    try:
        with writing(folder):
            # under the lock: files that another process is just saving would look like somebody else's
            if any(folder.iterdir()) and not _ours(folder):
                raise ArtifactError(
                    f"{folder} holds something that torchslim did not save; name an empty or a new folder"
                )
            _clear_staging(folder)
            staging = Path(tempfile.mkdtemp(dir=folder, prefix=f"{STAGING}-"))
            try:
                for name, data in files.items():
                    (staging / name).parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(staging / name, data)
                write_json(staging / MANIFEST, manifest)
                old = {name: value for name, value in _listed(folder).items() if name not in files}
                for name in files:
                    _make_parents(folder, name)
                # from here on nothing is written, only renamed
                (folder / MANIFEST).unlink(missing_ok=True)
                for name in (*files, MANIFEST):
                    (staging / name).replace(folder / name)
                for name, value in old.items():  # a stale model.onnx would be taken for this model
                    if is_file(folder / name) and within(folder, name) and sha256(folder / name) == value:
                        (folder / name).unlink(missing_ok=True)
                        _remove_empty(folder, name)
            finally:
                _clear(staging)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error


def within(folder: Path, name: str) -> bool:
    """Whether no folder on the way from `folder` to the file `name` is a link."""
    place = folder
    for word in name.split("/")[:-1]:
        place = place / word
        if place.is_symlink():
            return False
    return True


def _make_parents(folder: Path, name: str) -> None:
    if not within(folder, name):
        raise ArtifactError(f"{folder / name} lies behind a link; name an empty or a new folder")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)


def _remove_empty(folder: Path, name: str) -> None:
    """Remove the folders on the way to a deleted file that are empty now."""
    with suppress(OSError):  # they hold other files
        for parent in (folder / name).parents:
            if parent == folder:
                return
            parent.rmdir()


def is_file(path: Path) -> bool:
    """Whether `path` is an ordinary file, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _ours(folder: Path) -> bool:
    """Whether the contents of the folder come from a save, even a killed one, or from a run."""
    return (
        (folder / MANIFEST).is_file()
        or any(path.is_dir() and not path.is_symlink() for path in folder.glob(f"{STAGING}*"))
        or (folder / "run.json").is_file()
        or (folder / "work").is_dir()
    )


def _listed(folder: Path) -> dict[str, str]:
    """Hashes of the files of the artifact in a folder; none if its manifest is missing or damaged."""
    try:
        data = read_file(folder / MANIFEST, ArtifactError, size_bytes=LIMITS.size_bytes)
        return dict(parse_manifest(data, MANIFEST)["files"])
    except ArtifactError:
        return {}


def _clear_staging(folder: Path) -> None:
    for path in folder.glob(f"{STAGING}*"):
        _clear(path)


def _clear(staging: Path) -> None:
    """Delete a staging folder's files that a save writes; delete the folder if nothing else is in it."""
    if staging.is_symlink() or not staging.is_dir():
        return
    for path in staging.iterdir():
        if OURS.fullmatch(path.name) and is_file(path):
            path.unlink(missing_ok=True)
        elif PARTS in (staging.name, path.name):
            _clear(path)
    with suppress(OSError):  # the folder holds other files, which are not ours to delete
        staging.rmdir()
