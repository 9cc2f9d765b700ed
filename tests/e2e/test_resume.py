"""A run that is killed at any moment, and started again, ends as an undisturbed one does."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchslim as ts
from tests.e2e.killed import MOMENTS, run
from torchslim.steps import fingerprint


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ts.Result:
    return run(tmp_path_factory.mktemp("whole") / "eager")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on(moment: str, undisturbed: ts.Result, tmp_path: Path) -> None:
    folder = tmp_path / ("onnx" if moment == "export" else "eager")
    killed = subprocess.run(
        [sys.executable, "-m", "tests.e2e.killed", moment, folder],
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not (folder / "run.json").exists()

    resumed = run(folder)

    assert fingerprint(resumed.module.state_dict()) == fingerprint(undisturbed.module.state_dict())
    assert fingerprint(resumed.masks) == fingerprint(undisturbed.masks)
    assert fingerprint(resumed.model.state_dict()) == fingerprint(undisturbed.model.state_dict())
    before, after = undisturbed.run["rows"], resumed.run["rows"]
    steps = (
        slice(0, 4) if moment == "export" else slice(0, 5)
    )  # another runtime's artifact may round otherwise
    assert [row["metric"] for row in after[steps]] == [row["metric"] for row in before[steps]]
    assert [row["history"] for row in after] == [row["history"] for row in before]
