"""Predicted against measured latency of random joint choices: python -m benchmarks.predicted [--only NAME]

Measures the cost tables of each model on ONNX Runtime with one thread, then times random choices of a width for every
group and a scheme for every layer, and compares. Rows are kept in benchmarks/predicted.jsonl, and the programs of the
tables in the cache folder, so that a killed benchmark goes on; the page is benchmarks/predicted.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.rows import Row, append, load
from examples.fashion_mnist.model import ResNet
from torchslim.analysis.costs.measuring import PROGRAMS, WIDTHS, Subject, measured, tables, timed
from torchslim.analysis.costs.programs import random_choices
from torchslim.core.hardware import describe_machine
from torchslim.core.step import Target
from torchslim.prune.structured.plan import analyze
from torchslim.prune.structured.selection import Amount

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "predicted.jsonl", HERE / "predicted.md"
CHOICES = 30
MEDIAN, P90 = 0.05, 0.10
"""The errors that are aimed at: the median and the 90th percentile of |predicted / measured - 1|."""


class Series(nn.Module):
    """A convolution, a two-layer LSTM and a head over series of 100 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 64, 5, padding=2)
        self.lstm = nn.LSTM(64, 128, 2, batch_first=True)
        self.inner, self.head = nn.Linear(128, 128), nn.Linear(128, 6)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.conv(x.transpose(1, 2)).relu().transpose(1, 2))
        return self.head(self.inner(states[:, -1]).relu())


def _torchvision(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10), (torch.randn(1, 3, 64, 64),)

    return make


def _bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ids = torch.randint(0, 1000, (1, 32))
    return BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], tuple[str, ...]]] = {
    "demo": (lambda: (ResNet(), (torch.randn(1, 1, 28, 28),)), ("int8",)),
    "lstm": (lambda: (Series(), (torch.randn(1, 100, 8),)), ("int8", "int8-dynamic")),
    "resnet18": (_torchvision("resnet18"), ("int8",)),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), ("int8",)),
    "bert": (_bert, ("int8", "int8-dynamic")),
}


def measure(name: str) -> None:
    """Measure what is missing of one model, and store its errors once all is there."""
    make, schemes = CASES[name]
    torch.manual_seed(0)
    model, inputs = make()
    plan = analyze(model.eval(), inputs)
    target = Target(runtime="onnxruntime", threads=1)
    subject = Subject.of(plan, inputs, target, Amount(of="latency"), schemes, {}, "auto", WIDTHS)
    start = time.monotonic()
    samples, reference = measured(subject, PROGRAMS, 0)
    seconds = time.monotonic() - start
    kept = {row["number"]: row for row in load(ROWS) if row["model"] == name}
    program = None
    for number, choice in enumerate(random_choices(subject.space.kept, subject.space.schemes, CHOICES, 1)):
        if number in kept:
            continue
        if program is None:
            whole = subject.maker.model(subject.choices(0, 0)[0])
            assert whole is not None
            program = subject.maker.compile(whole)
        pair = timed(subject, choice, program)
        if pair is not None:
            found = tables(subject, samples, reference)
            places = found.space.places(choice)
            row: Row = {
                "model": name,
                "number": number,
                "measured": pair[0].ratio * reference.value,
                "predicted": found.predict(places),
                "upper": sum(term.at(places) for term in found.upper),
                "reference_ms": reference.value,
                "programs": len(samples),
                "seconds": round(seconds),
                "machine": describe_machine(1)["processor"],
            }
            append(row, ROWS)


def page() -> str:
    """The table of errors, a row for each model that was measured."""
    lines = [
        "# Predicted against measured latency",
        "",
        f"Cost tables of {PROGRAMS} programs predict random joint choices of a width for every group and a scheme for",
        "every layer, on ONNX Runtime with one thread, in CPU time. The error is |predicted / measured - 1|; its bars",
        f"are {MEDIAN:.0%} (median) and {P90:.0%} (90th percentile). A model that misses a bar is marked. Written by",
        "`python -m benchmarks.predicted`.",
        "",
        "| model | choices | float, full width | median error | 90th percentile | below upper end | within the bars |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = load(ROWS)
    for name in CASES:
        own = [row for row in rows if row["model"] == name]
        if not own:
            lines.append(f"| {name} | not measured | | | | | |")
            continue
        errors = np.array([abs(row["predicted"] / row["measured"] - 1) for row in own])
        median, p90 = np.median(errors), np.quantile(errors, 0.9)
        below = np.mean([row["measured"] <= row["upper"] for row in own])
        verdict = "yes" if median <= MEDIAN and p90 <= P90 else "no"
        lines.append(
            f"| {name} | {len(own)} | {own[-1]['reference_ms']:.2f} ms | {median:.1%} | {p90:.1%} | {below:.0%} | "
            f"{verdict} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the models, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CASES, action="append", help="measure these models alone")
    torch.set_num_threads(1)
    for name in parser.parse_args().only or CASES:
        measure(name)
        PAGE.write_text(page())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
