"""Latency as a budget, measured: python -m benchmarks.latency [--only TEXT]

Prunes the demo's network to 0.7, 0.5 and 0.3 and torchvision's resnet18 to 0.7 and 0.5 of their time on ONNX Runtime,
in fp32 and in int8, then times the result once more against the whole model. Rows are kept in benchmarks/latency.jsonl,
so that a killed benchmark goes on; the page is benchmarks/latency.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import torchslim as ts
from benchmarks.rows import Row, append, load
from examples.fashion_mnist.model import ResNet
from torchslim.core.hardware import describe_machine
from torchslim.prune.latency.solve import BAND, ROUNDS

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "latency.jsonl", HERE / "latency.md"
THREADS = 1
CASES = [
    (name, ends, sparsity)
    for name, sparsities in (("demo", (0.3, 0.5, 0.7)), ("resnet18", (0.3, 0.5)))
    for ends in ("fp32", "int8")
    for sparsity in sparsities
]


def context(name: str, ends: str) -> tuple[torch.nn.Module, ts.Context]:
    """A model and all that a step needs; the weights do not matter to the time."""
    torch.manual_seed(0)
    if name == "demo":
        model: torch.nn.Module = ResNet().eval()
        batch = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
    else:
        from torchvision.models import resnet18

        model = resnet18().eval()
        batch = torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))
    task = ts.Task(val=[batch], calibration=[batch], metric="accuracy")
    target, inputs = ts.Target(runtime="onnxruntime", threads=THREADS), (batch[0][:2],)
    steps = [ts.Quantize("int8")] if ends == "int8" else []
    bench = ts.Bench(task=task, example_inputs=inputs, target=target, steps=steps)
    return model, ts.Context(task=task, teacher=model, example_inputs=inputs, target=target, workbench=bench)


def measure(name: str, ends: str, sparsity: float) -> Row:
    """One case: what was predicted and measured in each round, and what the result takes when it is timed again."""
    model, ctx = context(name, ends)
    start = time.monotonic()
    outcome = ts.Prune(pattern="channel", sparsity=sparsity, of="latency")(model, ctx)
    seconds = time.monotonic() - start
    assert ctx.workbench is not None
    again = ctx.workbench.latency({"again": lambda: outcome.model}, model, again=True)["again"]
    (told,) = outcome.evidence["latency"]
    return {
        "model": name, "ends": ends, "sparsity": sparsity, "again": again, "seconds": seconds,
        "warnings": list(outcome.warnings), **told, "machine": describe_machine(THREADS),
    }  # fmt: skip


def page(rows: list[Row]) -> str:
    """The Markdown page, from the rows alone."""
    machine = rows[0]["machine"]
    lines = [
        "# Latency as a budget, as measured",
        "",
        "Written by `python -m benchmarks.latency`. The ceiling is 1 - sparsity of the whole model's time on ONNX",
        f"Runtime, one sample a call, {THREADS} thread; all times are over the whole model's, from paired rounds.",
        f"Wanted: achieved / ceiling in [{BAND:.2f}, 1.00], in at most {ROUNDS} rounds. *Again* is the same result,",
        "timed once more.",
        f"{machine['processor']}, {machine['instruction_set']}, onnxruntime {machine['versions']['onnxruntime']}.",
        "",
        "| model | ends | ceiling | predicted -> measured, by round | achieved / ceiling | holds | again / ceiling "
        "| programs timed | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ceiling = row["ceiling"]
        told = ", ".join(f"{round_['predicted']:.3f} -> {round_['measured']:.3f}" for round_ in row["rounds"])
        share = row["rounds"][row["best"] - 1]["measured"] / ceiling
        lines.append(
            f"| {row['model']} | {row['ends']} | {ceiling:.2f} | {told} | {share:.3f} "
            f"| {_holds(share, row['warnings'])} | {row['again'] / ceiling:.3f} | {row['programs']} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _holds(share: float, warnings: list[str]) -> str:
    if BAND <= share <= 1:
        return "yes"
    return f"**no**, and it warns: {'; '.join(warnings)}" if warnings else "**no**"


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="of the cases, those whose name holds this: 'demo fp32'")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    for case in CASES:
        known = [(row["model"], row["ends"], row["sparsity"]) for row in load(ROWS)]
        if case not in known and arguments.only in " ".join(map(str, case)):
            row = measure(*case)
            append(row, ROWS)
            print(case, row["rounds"][row["best"] - 1], flush=True)
    order: dict[Any, int] = {case: place for place, case in enumerate(CASES)}
    rows = sorted(load(ROWS), key=lambda row: order[row["model"], row["ends"], row["sparsity"]])
    if rows:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
