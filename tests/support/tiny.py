"""A run so small that it is taken hundreds of times: two steps, a cache of the teacher's answers, no timing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchslim as ts
from torchslim.artifact.latency import Timings
from torchslim.core.fingerprint import fingerprint

STEPS = 2


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def task() -> ts.Task:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return ts.Task(train=[(x[:16], y[:16]), (x[16:], y[16:])], val=[(x, y)], metric="accuracy")


def steps(cache: Path) -> list[ts.Step]:
    train = ts.Finetune(epochs=1, optimizer="sgd", lr=0.1)
    return [
        ts.Prune(
            pattern="channel", of="channels", sparsity=0.5, round_to=1, min_channels=1, criterion="l1", train=train
        ),
        ts.Distill(epochs=1, lr=0.1, cache=cache),
    ]


def run(folder: Path, **options: Any) -> ts.Result:
    """In `work`, with its cache in `cache`."""
    given = {"runtime": "eager", "threads": 1, "seed": 3, "workdir": folder / "work"}
    return ts.compress(model(), task(), steps(folder / "cache"), **given | options)


def compare(candidates: Any, **options: Any) -> Timings:
    """In place of `torchslim.pipeline.stage_timing.compare`: nothing here depends on time."""
    return Timings({name: [1.0, 1.0] for name in candidates})


def outcome(result: ts.Result) -> Any:
    """All that must be the same, however often the run was killed."""
    rows = [{key: row[key] for key in row if key != "seconds"} for row in result.run["rows"]]
    weights = fingerprint(result.module.state_dict()), fingerprint(dict(result.masks))
    return weights, result.deployed(torch.ones(2, 4)).tolist(), rows
