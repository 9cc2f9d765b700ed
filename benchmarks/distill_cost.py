"""What a step of distillation costs: beside the student's step and the teacher's forward pass, in turn."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import torchslim as ts
from benchmarks.distill_models import COUPLES
from benchmarks.rows import Row
from torchslim.artifact.latency import interleave
from torchslim.core.batches import batch_size, predictor
from torchslim.core.isolation import copy_model
from torchslim.distill import RKD, AttentionTransfer, Hint
from torchslim.training.loaders import indexed

ROUNDS, SECONDS = 60, 60.0
BARS = {"kd": 1.10, "dkd": 1.10, "dist": 1.10, "hint": 1.25, "attention": 1.25, "rkd": 1.25, "cached kd": 1.10}
TRAINED: dict[str, dict[str, Any]] = {
    "kd": {},
    "dkd": {"response": "dkd"},
    "dist": {"response": "dist"},
    "hint": {"feature": Hint()},
    "attention": {"feature": AttentionTransfer()},
    "rkd": {"relation": RKD()},
}
BATCHES = (64, 128, 256, 512)  # of which the angles' memory is shown


def costs(have: Container[tuple[str, str]]) -> Iterator[Row]:
    """A row for each way: its step over what it is made of, in paired rounds; then the memory of all triples."""
    for couple in COUPLES:
        if (couple, "cost of cached kd") not in have:
            yield from _couple(couple)
    for batch in BATCHES:
        if ("memory", f"batch {batch}") not in have:
            yield {"couple": "memory", "way": f"batch {batch}", "seed": 0, "ratios": [_peak(batch)]}


def _couple(couple: str) -> Iterator[Row]:
    found = COUPLES[couple]
    data = found.task()
    teacher, student = found.teacher(), found.student()
    batch = next(iter(data.train or ()))
    inputs = data.inputs(batch)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        fixed = ts.Task(
            train=[batch], val=[batch], metric="accuracy", inputs=data.inputs, target=data.target, mask=data.mask
        )
        ctx = ts.Context(task=fixed, teacher=teacher, example_inputs=inputs)
        asked = predictor(copy_model(teacher)[0].eval())
        candidates: dict[str, Callable[[], Any]] = {
            "student": stack.enter_context(_stepping(ts.Finetune(), student, ctx, batch)),
            "teacher": lambda: asked(*inputs),
        }
        for name, parts in TRAINED.items():
            step = ts.Distill(**parts, taps=found.taps)
            candidates[name] = stack.enter_context(_stepping(step, student, ctx, batch))
        cached = ts.Distill(cache=Path(folder) / "cache")
        cached(copy_model(student)[0], ctx)
        numbered = next(iter(indexed(fixed.train or (), lambda each: batch_size(data.inputs(each)))))
        candidates["cached kd"] = stack.enter_context(_stepping(cached, student, ctx, numbered))
        rounds = interleave(candidates, rounds=ROUNDS, seconds=SECONDS).rounds
    for name in (*TRAINED, "cached kd"):
        parts = ("student",) if name == "cached kd" else ("student", "teacher")
        base = [sum(values) for values in zip(*(rounds[part] for part in parts), strict=True)]
        yield {
            "couple": couple, "way": f"cost of {name}", "seed": 0, "bar": BARS[name], "over": " + ".join(parts),
            "ratios": [mine / below for mine, below in zip(rounds[name], base, strict=True)],
            "over_labels": [mine / below for mine, below in zip(rounds[name], rounds["student"], strict=True)],
        }  # fmt: skip


class _stepping:
    """One optimizer step of a way on a copy of the student, as a call."""

    def __init__(self, step: ts.Finetune | ts.Distill, student: Any, ctx: ts.Context, batch: Any) -> None:
        self.model, self.batch = copy_model(student)[0].train(), batch
        self.lesson = step.lesson(self.model, ctx)
        self.settings = step.settings()

    def __enter__(self) -> Callable[[], None]:
        lesson = self.lesson.__enter__()
        optimizer = self.settings.build(self.model, lesson.companion)

        def run() -> None:
            loss = torch.stack(list(lesson.objective(self.model, self.batch).values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return run

    def __exit__(self, *error: Any) -> None:
        self.lesson.__exit__(*error)


def _peak(batch: int) -> float:
    """Mebibytes by which the peak of a process grows with the loss of all triples and its gradient."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.distill_cost", str(batch)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    from torchslim.distill.losses.relation import rkd_angle

    torch.set_num_threads(1)
    rkd_angle(torch.randn(8, 16, requires_grad=True), torch.randn(8, 32)).backward()
    count = int(sys.argv[1])
    student, teacher = torch.randn(count, 64, requires_grad=True), torch.randn(count, 128)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    before = _kibibytes("VmRSS")
    rkd_angle(student, teacher).backward()
    print(max(_kibibytes("VmHWM") - before, 0) / 1024)
