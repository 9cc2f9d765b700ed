"""The scripts that docs/scaling.md has for Slurm, on a cluster of the test's own with two nodes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchslim as ts
from tests.support.slurm import Cluster, cluster
from tests.support.toy import task
from tests.support.waiting import until
from tests.support.workers import RECIPE, TRIALS, Watched, tried

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SCRIPTS = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        patch.setenv("OMP_NUM_THREADS", "1")
        with cluster() as found:
            yield found


def script(start: str, folder: Path, **replaced: str) -> str:
    """The script of the docs whose command starts so, with the test's recipe and folders in place of the docs'."""
    (found,) = (each for each in SCRIPTS if start in each)
    for old, new in {"recipe.toml": f"{folder}/recipe.toml", "/shared": str(folder), **replaced}.items():
        assert old in found
        found = found.replace(old, new)
    return found


def test_a_killed_worker_loses_its_trial_alone(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    study = Watched(tmp_path / "study.journal", "search")
    text = script("torchslim search", tmp_path, **{"postgresql+psycopg://user@host/studies": str(study.storage)})
    job = slurm.submit(text, "--array=0-1", "--gres=none", "--cpus-per-task=2", cwd=ROOT)
    until(lambda: study.running("SLURM_ARRAY_TASK_ID=1"), "a trial of the second worker")
    slurm.call("scancel", "--signal=KILL", f"{job}_1")
    assert slurm.finish(f"{job}_1") == "CANCELLED"
    assert slurm.finish(f"{job}_0") == "COMPLETED", slurm.output(job)
    lost, repeated = study.lost()
    assert len(lost) == 1
    assert repeated == lost
    assert len(tried(tmp_path / "search")) == TRIALS
    assert "failed" not in tried(tmp_path / "search")


def test_torchrun_trains_on_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        'model = "tests.support.toy:model"\ntask = "tests.support.toy:task"\nruntime = "eager"\nrehearse = false\n'
        '[[step]]\ndo = "distill"\nepochs = 1\n[[step]]\ndo = "tests.support.slow:Tell"\n'
    )
    text = script("torchslim run", tmp_path, **{'"$SLURM_GPUS_ON_NODE"': "1", "29500": str(slurm.port)})
    job = slurm.submit(text, "--gpus-per-node=0", "--cpus-per-task=2", cwd=ROOT)
    assert slurm.finish(job) == "COMPLETED", slurm.output(job)
    assert all(f"one of 2 on node {number}" in slurm.output(job) for number in (0, 1))
    ts.load(tmp_path / "run")(next(iter(task().val))[0])
