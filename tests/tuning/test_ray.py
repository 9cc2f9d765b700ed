"""The program that docs/scaling.md has for Ray, on a cluster of the test's own with two nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ray_cluster import ray_cluster
from tests.support.waiting import until
from tests.support.workers import RECIPE, TRIALS, Watched, tried

ROOT = Path(__file__).parents[2]
(PROGRAM,) = re.findall(r"```py\n(.*?import ray\n.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
MARK = "TORCHSLIM_TESTED_ENGINE"


def program(folder: Path, storage: Path) -> str:
    """The program of the docs with the test's recipe, folders and numbers."""
    text = PROGRAM
    replaced = {
        "examples.fashion_mnist": "tests.support.toy",
        "postgresql+psycopg://user@host/studies": str(storage),
        "num_gpus=1, num_cpus=8": "num_cpus=1",
        "/shared": str(folder),
        "recipe.toml": f"{folder}/recipe.toml",
        "range(8)": "range(2)",
    }
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_a_killed_worker_loses_its_trial_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    study = Watched(tmp_path / "study.journal", "search")
    (tmp_path / "driver.py").write_text(program(tmp_path, study.storage))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.setenv(MARK, "ray")
    with ray_cluster() as address, (tmp_path / "output.txt").open("w") as output:
        environment = {**os.environ, "RAY_ADDRESS": address}
        command = [sys.executable, str(tmp_path / "driver.py")]
        driver = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            _, victim = until(lambda: study.running(f"{MARK}=ray"), "a trial of a worker")
            os.kill(victim, signal.SIGKILL)
            assert driver.wait(timeout=600) == 0, (tmp_path / "output.txt").read_text()[-3000:]
        finally:
            driver.kill()
            driver.wait()
    lost, repeated = study.lost()
    assert len(lost) == 1
    assert repeated == lost
    assert len(tried(tmp_path / "search")) == TRIALS
