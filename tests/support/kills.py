"""What a process that is killed leaves in a folder: copies of it, taken just before every change that it makes there."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RENAMES = frozenset({"os.rename"})
CHANGES = RENAMES | {"os.remove", "os.rmdir", "os.mkdir", "os.link"}


class Camera:
    """An audit hook, which cannot be taken away again: one for all tests, idle unless it is pointed at a folder."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.events: frozenset[str] = RENAMES
        self.album = Path()
        self.count = 0
        self.spared: Callable[[str], bool] = lambda path: False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or event not in self.events:
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        inside = path.startswith(str(self.folder)) or args[-1] not in (-1, None, args[0])  # relative to an open folder
        if not inside or self.spared(path):
            return
        folder, self.folder = self.folder, None  # what is copied changes files, too
        try:
            if folder.exists():
                # Optuna's lock is held for moments, by the thread that beats, too
                shutil.copytree(
                    folder, self.album / f"{self.count:03d}", symlinks=True, ignore=lambda place, names: [
                        name for name in names if name.startswith("study.journal.")
                    ],
                )  # fmt: skip
            else:
                (self.album / f"{self.count:03d}").mkdir()
            self.count += 1
        finally:
            self.folder = folder


_CAMERA: list[Camera] = []


@contextmanager
def _pointed(folder: Path, album: Path, events: frozenset[str], spared: Callable[[str], bool]) -> Iterator[None]:
    camera = _CAMERA[0] if _CAMERA else Camera()
    _CAMERA[:] = [camera]
    album.mkdir(parents=True)
    camera.album, camera.events, camera.count, camera.spared, camera.folder = album, events, 0, spared, folder
    try:
        yield
    finally:
        camera.folder = None


def states(
    work: Callable[[], Any],
    folder: Path,
    album: Path,
    *,
    events: frozenset[str] = RENAMES,
    spared: Callable[[str], bool] = lambda path: False,
) -> list[Path]:
    """Run `work`; return copies of `folder` as it was before each change in it: what a kill at that moment leaves."""
    with _pointed(folder, album, events, spared):
        work()
    return sorted(album.iterdir())


def listing(folder: Path) -> set[str]:
    """All files in a folder and below it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
