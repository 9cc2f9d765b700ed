"""One process at a time: a lock on a folder, which the system releases when its holder ends, however it ends.

A run holds its working folder; a save, or a load, holds the folder of an artifact for as long as it touches files.

The lock of a run is `flock` on the file `.torchslim.lock`. That file is written first and never deleted, so it also
marks the folder as one of torchslim's: a run that is killed before it wrote anything else can go on. NFS since Linux
2.6.12 keeps `flock` between machines. On a file system that has no locks a warning says so, and the work goes on. An
artifact is locked by its folder, beside whose files no lock file may stand.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from torchslim.core.isolation import warn
from torchslim.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".torchslim.lock"
LOOK_SECONDS = 0.2  # between two tries of one that waits
FOLDER_SECONDS = 60.0  # a folder is locked for one write or read, which takes seconds
ORPHAN_SECONDS = 15.0  # loader workers of a killed process hold its lock until they notice that it is gone
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
TAKEN = (errno.EAGAIN, errno.EACCES)
INFO_BYTES = 4096


@contextmanager
def holding(path: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    Args:
        path: the lock file; made where it is missing.
        waiting: called once with who holds it, where another process does; then the lock is waited for. None: an error.

    Raises:
        StorageError: another process holds it, and says which; or the file cannot be made.
    """
    handle = _opened(path)
    try:
        locked = _lock(handle, path, waiting)
        try:
            _say(
                handle,
                path,
                {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "started": started(os.getpid()),
                    "since": datetime.now().astimezone().isoformat(timespec="seconds"),
                },
            )
            yield
        finally:
            if locked:
                fcntl.flock(handle, fcntl.LOCK_UN)  # of forked children too, which share it
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # never through a link: what it points to would be overwritten
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        return os.open(path, flags, 0o666)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; name a folder that you may write to"
        ) from error


def _lock(handle: int, path: Path, waiting: Callable[[str], None] | None) -> bool:
    """Take the lock; False on a file system without locks."""
    since, told = time.monotonic(), False
    while True:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no flock")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                warn(f"{path.parent} cannot be locked ({error.strerror}); see that no other process works in it")
                return False
            if error.errno not in TAKEN:
                raise StorageError(f"cannot lock {path}: {error.strerror}; name another folder") from error
        holder = _holder(handle)
        orphaned = holder is not None and is_dead(holder) is True
        if waiting is None and not (orphaned and time.monotonic() - since < ORPHAN_SECONDS):
            raise StorageError(
                f"{path.parent} is in use by {_named(holder)}; wait until it ends, or name another folder"
            )
        if waiting is not None and not told:
            waiting(f"waiting for {_named(holder)}")
            told = True
        time.sleep(LOOK_SECONDS)


def _say(handle: int, path: Path, holder: Mapping[str, Any]) -> None:
    """Write who holds the lock. No seal and no rename: only the one who holds it writes, and nobody relies on it."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free some space") from error


def _holder(handle: int) -> dict[str, Any] | None:
    try:
        found = json.loads(os.pread(handle, INFO_BYTES, 0))
        return {
            "host": str(found["host"])[:80],
            "pid": int(found["pid"]),
            "since": str(found["since"])[:40],
            "started": found["started"],
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # it is just being written, or damaged: the lock itself tells that somebody is there


def _named(holder: Mapping[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    who = "this process" if holder["pid"] == os.getpid() and is_dead(holder) is False else f"process {holder['pid']}"
    gone = " (which is gone, but a child of it still runs)" if is_dead(holder) else ""
    return ascii(f"{who} on {holder['host']}{gone}, since {holder['since']}")[1:-1]


def started(pid: int) -> str | None:
    """When a process of this machine was started; None where it is gone or nobody can tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_dead(process: Mapping[str, Any]) -> bool | None:
    """Is a process, given by host, pid and started, gone? None for those of other machines."""
    if process["host"] != socket.gethostname():
        return None
    try:
        os.kill(int(process["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return process["started"] is not None and started(int(process["pid"])) != process["started"]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a folder, and be the only one who writes there while the block runs, with nobody `reading`.

    On a file system without locks the block runs at once.

    Raises:
        StorageError: it cannot be made, or another process is writing there, or reading, for long.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    with _locked(folder, "writing to, or reading,", shared=False):
        yield


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Wait until nobody is `writing` to a folder, and have others wait to write there while the block runs.

    Where the folder is missing, or may not be opened, the block runs at once.

    Raises:
        StorageError: another process is writing there, for long.
    """
    with _locked(folder, "writing to", shared=True):
        yield


@contextmanager
def _locked(folder: Path, others: str, *, shared: bool) -> Iterator[None]:
    handle = _folder(folder)
    if handle is None:
        yield
        return
    try:
        end = time.monotonic() + FOLDER_SECONDS
        while not _taken(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() > end:
                raise StorageError(
                    f"another process is {others} {folder} for over {FOLDER_SECONDS:.0f} s; wait until it ends, or "
                    "name another folder"
                )
            time.sleep(FOLDER_SECONDS / 1200)
        try:
            yield
        finally:
            _taken(handle, fcntl.LOCK_UN)  # of forked children too, which share it
    finally:
        os.close(handle)


def _folder(folder: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        return os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:  # whoever reads or writes there says more
        return None


def _taken(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in TAKEN  # else a file system without locks
    return True
