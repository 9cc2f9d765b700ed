"""Writes that are whole or absent: a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchslim.errors import StorageError

TEMPORARY = ".torchslim-tmp-"  # what a killed process left under such a name is nobody's, and may be deleted


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it takes `path`'s place, else it is deleted.

    Raises:
        StorageError: when the disk is full or the folder cannot be written; what stood at `path` is kept.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a fresh name each time: a file that a killed run left behind is never mistaken for ours
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(6)}{path.suffix}"
        # not by tempfile, whose files nobody else may read: the umask decides
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder, then run "
            "again (what was finished before is kept)"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def clean_temporaries(folder: Path, *, older_s: float = 0.0) -> None:
    """Delete what killed writers left in a folder and below it.

    Args:
        folder: links in it are not followed.
        older_s: spare files younger than that, where other processes may be writing: a write takes seconds.

    Raises:
        StorageError: a file cannot be deleted.
    """
    before = time.time() - older_s
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            try:
                if name.startswith(TEMPORARY) and path.lstat().st_mtime <= before:
                    path.unlink()
            except FileNotFoundError:
                pass  # its writer is alive, and has just renamed it
            except OSError as error:
                raise StorageError(f"cannot delete {path}: {error.strerror or error}; delete it by hand") from error


def present(path: Path) -> bool:
    """Does anything stand at a path, be it a broken link? What may not be looked at counts as nothing."""
    return os.path.lexists(path)


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a whole folder; nothing where there is nothing.

    Raises:
        StorageError: it cannot be deleted.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot delete {path}: {error.strerror or error}; delete it by hand") from error


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """Hex digest of bytes and JSON-able values, order included."""
    total = hashlib.sha256()
    for part in parts:
        kind, data = (b"b", part) if isinstance(part, bytes) else (b"j", json.dumps(part, sort_keys=True).encode())
        total.update(kind + len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def bundle(files: Mapping[str, bytes]) -> bytes:
    """Several files as one: a zip, uncompressed and without times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def unbundle(data: bytes) -> dict[str, bytes]:
    """The files of a bundle, in their order."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}
