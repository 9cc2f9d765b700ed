"""Programs beyond Python that some tests need: where they are looked for, and what to install without them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def require(name: str, packages: str, *found: str | Path | None) -> None:
    """Skip the test where a program is missing; fail instead where CI is set, for nothing may be skipped there."""
    if all(found):
        return
    message = f"no {name} here: apt-get install {packages} (where CI is set, this is a failure)"
    stop: Callable[[str], object] = pytest.fail if "CI" in os.environ else pytest.skip
    stop(message)


def chromium() -> tuple[str, str]:
    """The paths of the browser and of its driver; the test is skipped where one of them is missing."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    require("Chromium with its driver", "chromium chromium-driver", browser, driver)
    assert browser is not None
    assert driver is not None
    return browser, driver


def postgresql() -> Path:
    """The folder of the newest server's programs; the test is skipped where none is installed."""
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    on_path = shutil.which("initdb")
    newest = max(folders, key=lambda folder: int(folder.parent.name), default=None)
    folder = newest or (Path(on_path).parent if on_path else None)
    require("PostgreSQL server", "postgresql", folder)
    assert folder is not None
    return folder


def slurm() -> Path:
    """The folder of Slurm's and Munge's services; the test is skipped where one of them is missing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    found = [shutil.which(name, path=path) for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun")]
    require("Slurm", "slurm-wlm munge", *found)
    assert found[0] is not None
    return Path(found[0]).parent
