"""The memory of a deployed model is measured in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchslim as ts
from torchslim.artifact.peak_memory import peak_memory
from torchslim.errors import DeployError


@pytest.mark.slow
def test_a_larger_model_takes_more_and_at_least_its_weights() -> None:
    taken = []
    for width in (64, 2048):
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        taken.append(peak_memory(ts.deploy(model, (torch.ones(2, width),), threads=1)))
    weights = 4 * 2 * 2048**2
    assert taken[1] - taken[0] > 0.9 * weights
    assert taken[1] < 8 * weights


@pytest.mark.slow
def test_a_process_that_fails_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchslim.artifact.peak_memory.PROGRAM", "raise SystemExit('no such thing')")
    with pytest.raises(DeployError, match="ended with no such thing"):
        peak_memory(ts.deploy(nn.Linear(2, 2), (torch.ones(1, 2),), threads=1))
