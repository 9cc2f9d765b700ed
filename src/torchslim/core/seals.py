"""Seals bind the files of a run to the run's key, to detect edited files and files of another run.

The key of a run is derived from its weights, data, steps and seed. It is never stored: a folder holds only its `key_id`
and the seals made with it. A person who can write to a folder, but lacks the weights and the data, cannot make a valid
seal. Machine code needs more: a secret of this user on this machine; see `own_secret`.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from torchslim.core.files import digest, replacing
from torchslim.core.hardware import cache_folder
from torchslim.errors import StorageError

MAGIC = b"torchslim sealed 1\n"
SIZE = 32  # bytes of an HMAC-SHA256
SECRET = "secret"


def key_id(key: str) -> str:
    """Name of a key, from which the key cannot be computed."""
    return digest("torchslim key id", key)


def seal(key: str, *content: Any) -> str:
    """HMAC-SHA256 of bytes and JSON-able values, as hex digits."""
    return hmac.new(key.encode(), digest(*content).encode(), "sha256").hexdigest()


def is_sealed(found: str, key: str, *content: Any) -> bool:
    """Whether the seal `found` was made with this key, of this content."""
    return hmac.compare_digest(found.encode(), seal(key, *content).encode())


def write_sealed(path: Path, data: bytes, key: str) -> None:
    """Write `data` behind its seal, whole or not at all.

    Raises:
        StorageError: the file cannot be written; the previous file is kept.
    """
    sealed = hmac.new(key.encode(), data, "sha256").digest()
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(MAGIC)
        file.write(sealed)
        file.write(data)


def read_sealed(path: Path, key: str) -> bytes:
    """Data that `write_sealed` wrote with this key.

    Raises:
        StorageError: the file cannot be read, was changed since it was written, or belongs to another run.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    head, data = content[: len(MAGIC) + SIZE], content[len(MAGIC) + SIZE :]
    if not hmac.compare_digest(head, MAGIC + hmac.new(key.encode(), data, "sha256").digest()):
        raise StorageError(f"{path} was truncated or changed since it was written, or belongs to another run")
    return data


def own_secret() -> str | None:
    """Random text that only this user can read, created on first use; None if no such file can be kept.

    It is stored in `cache_folder()`. Another machine, another user, or an emptied cache has another secret.
    """
    path = cache_folder() / SECRET
    secret = _read_secret(path)
    if secret is not None or not hasattr(os, "getuid"):
        return secret
    temporary = path.with_name(f".{SECRET}-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        os.link(temporary, path)  # unlike a rename, a link never replaces the file of a faster process
    except FileExistsError:
        pass  # the file of a faster process, which is read below, or a file that is no secret
    except OSError:
        return None  # a home without write access: machine code is compiled again instead of loaded
    finally:
        temporary.unlink(missing_ok=True)
    return _read_secret(path)


def _read_secret(path: Path) -> str | None:
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
        if not private or not hasattr(os, "getuid") or status.st_uid != os.getuid():
            return None
        data = file.read(65)
    return data.decode("ascii", "replace") if len(data) == 64 else None
