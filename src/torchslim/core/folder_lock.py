"""Lock a folder for one process; the system releases the lock when the process ends, even if it is killed.

A run locks its working folder; a save or a load locks the folder of an artifact while it touches files.

The lock of a run is `flock` on the file `.torchslim.lock`. That file is written first and never deleted, so it also
marks the folder as one of torchslim's: a run that is killed before it wrote anything else can resume. NFS since Linux
2.6.12 keeps `flock` between machines. On a file system without locks, torchslim warns and continues. For an artifact
the folder itself is locked, because no lock file may be among its files.
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
LOOK_SECONDS = 0.2  # between two tries of a waiting process
FOLDER_SECONDS = 60.0  # a folder is locked for one write or read, which takes seconds
ORPHAN_SECONDS = 15.0  # loader workers of a killed process hold its lock until they notice its end
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
TAKEN = (errno.EAGAIN, errno.EACCES)
INFO_BYTES = 4096


@contextmanager
def holding(path: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    Args:
        path: the lock file, created if it is missing.
        waiting: called once with a message that names the holder, before waiting for the lock; None: an error instead.

    Raises:
        StorageError: another process, named in the message, holds the lock; or the file cannot be created.
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
                fcntl.flock(handle, fcntl.LOCK_UN)  # also for forked children, which share the lock
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # never through a link: its target would be overwritten
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        return os.open(path, flags, 0o666)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; name a folder that you may write to"
        ) from error


def _lock(handle: int, path: Path, waiting: Callable[[str], None] | None) -> bool:
    """Take the lock and return True; return False on a file system without locks."""
    since, announced = time.monotonic(), False
    while True:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no flock")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                warn(f"{path.parent} cannot be locked ({error.strerror}); make sure that no other process uses it")
                return False
            if error.errno not in TAKEN:
                raise StorageError(f"cannot lock {path}: {error.strerror}; name another folder") from error
        holder = _holder(handle)
        orphaned = holder is not None and is_dead(holder) is True
        if waiting is None and not (orphaned and time.monotonic() - since < ORPHAN_SECONDS):
            raise StorageError(
                f"{path.parent} is in use by {_named(holder)}; wait until it ends, or name another folder"
            )
        if waiting is not None and not announced:
            waiting(f"waiting for {_named(holder)}")
            announced = True
        time.sleep(LOOK_SECONDS)


def _say(handle: int, path: Path, holder: Mapping[str, Any]) -> None:
    """Write the lock's holder. No seal and no rename: only the holder writes, and nothing depends on the text."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free some space") from error


def _holder(handle: int) -> dict[str, Any] | None:
    try:
        info = json.loads(os.pread(handle, INFO_BYTES, 0))
        return {
            "host": str(info["host"])[:80],
            "pid": int(info["pid"]),
            "since": str(info["since"])[:40],
            "started": info["started"],
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # just being written, or damaged: the lock itself shows that there is a holder


def _named(holder: Mapping[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    who = "this process" if holder["pid"] == os.getpid() and is_dead(holder) is False else f"process {holder['pid']}"
    gone = " (which is gone, but a child of it still runs)" if is_dead(holder) else ""
    return ascii(f"{who} on {holder['host']}{gone}, since {holder['since']}")[1:-1]


def started(pid: int) -> str | None:
    """Start time of a process of this machine; None if the process has ended or the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_dead(process: Mapping[str, Any]) -> bool | None:
    """Whether a process, identified by host, pid and start time, has ended; None for other machines' processes."""
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
    """Create a folder, and lock it against other writers and readers while the block runs.

    On a file system without locks the block runs at once.

    Raises:
        StorageError: the folder cannot be created, or another process writes or reads there for long.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    with _locked(folder, "writing to, or reading,", shared=False):
        yield


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Wait until no process is `writing` to a folder, and lock it against writers while the block runs.

    If the folder is missing or cannot be opened, the block runs at once.

    Raises:
        StorageError: another process writes there for long.
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
                    f"another process has been {others} {folder} for over {FOLDER_SECONDS:.0f} s; wait until it ends, "
                    "or name another folder"
                )
            time.sleep(FOLDER_SECONDS / 1200)
        try:
            yield
        finally:
            _taken(handle, fcntl.LOCK_UN)  # also for forked children, which share the lock
    finally:
        os.close(handle)


def _folder(folder: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        return os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:  # the caller's own read or write reports the error
        return None


def _taken(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in TAKEN  # other errors: a file system without locks
    return True
