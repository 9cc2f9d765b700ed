"""Run the toy recipe in a process of its own, which kills itself (SIGKILL) at a named moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import torchslim as ts
from tests.support import toy
from tests.support.forked import become, context
from tests.support.rehearsals import skip
from tests.support.timing import shorten
from torchslim.runtimes import onnxruntime

STEPS = [
    ts.Prune(sparsity=0.5, schedule="iterative", rounds=2, train=ts.Finetune(epochs=2, optimizer="sgd", lr=1e-2)),
    ts.Prune(
        pattern="channel",
        sparsity=0.6,
        of="channels",
        round_to=1,
        min_channels=1,
        criterion="taylor",
        schedule="iterative",
        rounds=2,
        train=ts.Finetune(epochs=2, optimizer="sgd", lr=1e-2),
        sparsify="group-lasso",
    ),
    ts.Distill(epochs=3, lr=1e-2),
    ts.Quantize("int8"),
]
MOMENTS = ("prune", "channels", "cut", "distill", "checkpoint", "quantize", "export", "artifact")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> Any:
    """A progress callback, with traps laid, for the moment to die at."""
    steps_seen = {"prune": 0, "distill": 0}

    def progress(event: ts.Event) -> None:
        if event.phase.startswith(("train", "prune")) and event.step in steps_seen:
            steps_seen[event.step] += 1
            # in the middle of an epoch that is neither the first nor the last
            if event.step == moment and steps_seen[moment] == 12:
                die()
            # weights take 32 steps; this is the second round of the channels
            if moment == "channels" and steps_seen["prune"] == 53:
                die()
        if moment == "cut" and event.phase == "cut-2":
            die()
        if event.step == moment == "quantize" and event.phase == "start":
            original = torch.Tensor.isfinite
            torch.isfinite = lambda value: (die(), original(value))[1]  # type: ignore[assignment]
        if event.step == moment == "artifact" and event.phase == "measure latency":
            die()

    if moment == "checkpoint":
        replace, count = Path.replace, [0]

        def half_written(self: Path, target: Path) -> Path:
            if Path(target).suffix == ".ckpt":
                count[0] += 1
                if count[0] == 14:  # the second epoch of the distillation
                    self.write_bytes(self.read_bytes()[:100])
                    die()
            return replace(self, target)

        Path.replace = half_written  # type: ignore[method-assign,assignment]
    if moment == "export":
        export, calls = onnxruntime.to_onnx_program, [0]

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            done = export(*args, **kwargs)
            if calls[0] == 4:  # the distilled model is trained, its export is not kept yet
                die()
            return done

        onnxruntime.to_onnx_program = interrupted  # type: ignore[attr-defined]
    return progress


def run(folder: Path, moment: str = "") -> ts.Result:
    runtime = "onnxruntime" if moment == "export" or folder.name.startswith("onnx") else "eager"
    return ts.compress(
        toy.model(),
        toy.task(),
        STEPS,
        runtime=runtime,
        threads=1,
        seed=3,
        workdir=folder,
        progress=arm(moment),
    )


def end(moment: str, folder: Path) -> int | None:
    """The exit code of a process that runs the recipe and kills itself."""
    process = context().Process(target=_run_alone, args=(folder, moment, dict(os.environ)))
    process.start()
    process.join(timeout=300)
    return process.exitcode


def _run_alone(folder: Path, moment: str, environment: Mapping[str, str]) -> None:
    become(environment)
    shorten(pytest.MonkeyPatch())
    skip(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    run(folder, moment)
