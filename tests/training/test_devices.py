"""Training steps with a scale of the losses, as float16 needs one; a scaler for the CPU stands for that of a GPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn

import torchslim as ts
from torchslim.training.checkpoint import Record
from torchslim.training.devices import Placement, fabric_for, placed
from torchslim.training.loop import Loop
from torchslim.training.optimizer import OptimizerSettings


@contextmanager
def placement(*, scaled: bool) -> Iterator[Placement]:
    """A model of one weight on the CPU, with or without a scale of the losses."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[*plugins, LightningEnvironment()])
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    with placed(fabric, ts.Engine(), model, nn.Module(), OptimizerSettings(optimizer="sgd", lr=0.1)) as place:
        yield place


def scale(place: Placement) -> float:
    return float(place.fabric.strategy.precision.state_dict()["scale"])


def overflow(place: Placement) -> float | None:
    """A step whose gradient is infinite only because the loss was scaled; the norm that clipping reports."""
    place.backward([place.model.weight.sum() * 1e35], [])
    norm = place.clip(1.0)
    place.stepper.step()
    return norm


def test_a_step_whose_scaled_gradient_overflows_is_skipped() -> None:
    with placement(scaled=True) as place:
        assert overflow(place) is None
        assert float(place.model.weight) == 1.0
        assert scale(place) == 2.0**15


def test_norms_without_overflow_are_reported() -> None:
    with placement(scaled=True) as place:
        place.backward([place.model.weight.sum() * 3], [])
        assert place.clip(1.0) == pytest.approx(3.0)


def test_without_a_scale_an_infinite_norm_is_reported() -> None:
    with placement(scaled=False) as place:
        place.backward([place.model.weight.sum() * 1e38 * 10], [])
        norm = place.clip(1.0)
        assert norm is not None
        assert math.isinf(norm)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_checkpoint_holds_the_scale(scaled: bool, tmp_path: Path) -> None:
    """A checkpoint with a scale can be read without one, as after a move from a GPU to the CPU."""
    path = tmp_path / "fit.ckpt"
    with placement(scaled=True) as place:
        overflow(place)
        Record(place, path, "").add(Loop(place.model, place.optimizer, 2), {"epoch": 1.0})
    with placement(scaled=scaled) as place:
        Record(place, path, "").resume(Loop(place.model, place.optimizer, 2))
        assert place.scales_losses is scaled
        if scaled:
            assert scale(place) == 2.0**15


def test_where_slurm_is_installed_nothing_is_said_about_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric warns wherever it finds `srun` and was not started by it."""
    srun = tmp_path / "srun"
    srun.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fabric_for(ts.Engine(accelerator="cpu")):
            pass


def test_processes_of_one_srun_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are workers of a search: torchrun alone joins processes to one training."""
    for name, value in {"JOB_NAME": "search", "NTASKS": "2", "PROCID": "1", "LOCALID": "1", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with fabric_for(ts.Engine(accelerator="cpu")) as fabric:
        assert fabric.world_size == 1
        assert fabric.is_global_zero
