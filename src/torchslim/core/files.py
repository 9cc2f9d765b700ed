"""Atomic writes: a temporary file is flushed to disk, then renamed."""

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

TEMPORARY = ".torchslim-tmp-"  # prefix; files that a killed process left under it may be deleted


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it replaces `path`, else it is deleted.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the previous `path` is kept.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a fresh name every time: a file that a killed run left behind is never mistaken for ours
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(6)}{path.suffix}"
        # not tempfile, whose files only their owner may read: here the umask decides
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
    """Write `data` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are a ValueError."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON; NaN and infinity are a ValueError."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def clean_temporaries(folder: Path, *, older_s: float = 0.0) -> None:
    """Delete temporary files that killed writers left in a folder and below it.

    Args:
        folder: links in it are not followed.
        older_s: minimum age in seconds; spares files that other processes are writing, as a write takes seconds.

    Raises:
        StorageError: a file cannot be deleted.
    """
    before = time.time() - older_s
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            try:
                if name.startswith(TEMPORARY) and path.lstat().st_mtime <= before:
                    path.unlink()
            except FileNotFoundError:
                pass  # its writer is alive and has just renamed it
            except OSError as error:
                raise StorageError(f"cannot delete {path}: {error.strerror or error}; delete it by hand") from error


def present(path: Path) -> bool:
    """Whether a path exists; a broken link does, a path without access permission does not."""
    return os.path.lexists(path)


def remove(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder with its contents, if it exists.

    Raises:
        StorageError: the path cannot be deleted.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot delete {path}: {error.strerror or error}; delete it by hand") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """SHA-256 of bytes and JSON-able values in order, as hex digits."""
    total = hashlib.sha256()
    for part in parts:
        kind, data = (b"b", part) if isinstance(part, bytes) else (b"j", json.dumps(part, sort_keys=True).encode())
        total.update(kind + len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def bundle(files: Mapping[str, bytes]) -> bytes:
    """Pack files into one: a zip, uncompressed and without times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def unbundle(data: bytes) -> dict[str, bytes]:
    """Files of a bundle by name, in their order."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}
