"""A run that is killed at any moment, and started again, ends as an undisturbed one does."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import torchslim as ts
from tests.support import toy
from tests.support.killed import MOMENTS, end, run
from torchslim.core.fingerprint import fingerprint


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ts.Result]:
    """The run that nobody killed, on each runtime: the runtime decides how many bits the weights take."""
    return cache(lambda runtime: run(tmp_path_factory.mktemp("whole") / runtime))


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on(moment: str, undisturbed: Callable[[str], ts.Result], tmp_path: Path) -> None:
    runtime = "onnx" if moment == "export" else "eager"
    folder, whole = tmp_path / runtime, undisturbed(runtime)
    assert end(moment, folder) == -signal.SIGKILL
    assert not (folder / "run.json").exists()

    resumed = run(folder)

    assert fingerprint(resumed.module.state_dict()) == fingerprint(whole.module.state_dict())
    assert fingerprint(resumed.masks) == fingerprint(whole.masks)
    images, _ = toy.images(32, 8)
    assert torch.equal(resumed.model(images), whole.model(images))
    assert torch.equal(resumed.deployed(images), whole.deployed(images))
    before, after = whole.run["rows"], resumed.run["rows"]
    assert [row["metric"] for row in after] == [row["metric"] for row in before]
    assert [row["history"] for row in after] == [row["history"] for row in before]
