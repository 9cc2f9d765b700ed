"""Predicted against measured latency of random joint choices: python -m benchmarks.predicted [--only NAME]

Measures the cost tables of each model with one thread, then times random choices of a width for every group and a
scheme for every layer, and compares. Each of these programs is timed again after the next one was measured: the error
of such a repeat is the noise below which no prediction can come. Rows are kept in benchmarks/predicted.jsonl, and the
programs of the tables in the cache folder, so that a killed benchmark goes on; the page is benchmarks/predicted.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.rows import Row, append, load, version
from examples.fashion_mnist.model import ResNet
from torchslim.analysis.costs.measuring import WIDTHS, Subject, compared, measured, tables
from torchslim.analysis.costs.programs import Choice, random_choices
from torchslim.analysis.costs.tables import CostTables
from torchslim.core.hardware import describe_machine
from torchslim.core.step import Target
from torchslim.prune.structured.plan import analyze
from torchslim.prune.structured.selection import Amount
from torchslim.runtimes import Deployed

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "predicted.jsonl", HERE / "predicted.md"
CHOICES = 30
SEED = 2
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


def _demo() -> tuple[nn.Module, Any]:
    return ResNet(), (torch.randn(1, 1, 28, 28),)


def _series() -> tuple[nn.Module, Any]:
    return Series(), (torch.randn(1, 100, 8),)


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], tuple[str, ...], str]] = {
    "demo": (_demo, ("int8",), "onnxruntime"),
    "lstm": (_series, ("int8", "int8-dynamic"), "onnxruntime"),
    "resnet18": (_torchvision("resnet18"), ("int8",), "onnxruntime"),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), ("int8",), "onnxruntime"),
    "bert": (_bert, ("int8", "int8-dynamic"), "onnxruntime"),
    "demo-openvino": (_demo, ("int8",), "openvino"),
}
"""By name a model with its inputs, the schemes of its layers, and the runtime."""


def measure(name: str) -> None:
    """Measure what is missing of one model, and store its errors."""
    make, schemes, runtime = CASES[name]
    torch.manual_seed(0)
    model, inputs = make()
    plan = analyze(model.eval(), inputs)
    target = Target(runtime=runtime, threads=1)
    subject = Subject.of(plan, inputs, target, Amount(of="latency"), schemes, {}, "auto", WIDTHS)
    start = time.process_time()
    samples, reference = measured(subject, None, 0)
    seconds = time.process_time() - start
    done = {row["number"] for row in load(ROWS) if row["model"] == name}
    whole = subject.maker.model(subject.choices(0, 0)[0])
    assert whole is not None
    program = subject.maker.compile(whole)
    waiting: tuple[Row, Deployed] | None = None

    def repeat() -> None:
        if waiting is not None:
            row, deployed = waiting
            append(row | {"again": compared(deployed, program, target)[0]}, ROWS)

    choices = random_choices(subject.space.kept, subject.space.schemes, CHOICES, SEED)
    for number, choice in enumerate(choices):
        if number in done or (model_of_choice := subject.maker.model(choice)) is None:
            continue
        deployed = subject.maker.compile(model_of_choice)
        ratio, _ = compared(deployed, program, target)
        repeat()
        row: Row = {"model": name, "number": number, "measured": ratio}
        waiting = row, deployed
    repeat()
    predict(name, tables(subject, samples, reference), choices, round(seconds))


def predict(name: str, found: CostTables, choices: Sequence[Choice], seconds: int) -> None:
    """Write the predictions of the present code into the rows of a model; times are over the reference's."""
    rows = load(ROWS)
    for row in rows:
        if row["model"] == name:
            places = found.space.places(choices[row["number"]])
            reference_ms = found.reference.value
            row |= {
                "predicted": found.predict(places) / reference_ms,
                "upper": sum(term.at(places) for term in found.upper) / reference_ms,
                "reference_ms": reference_ms,
                "programs": found.programs,
                "seconds": max(seconds, row.get("seconds", 0)),
                "machine": describe_machine(1)["processor"],
                "version": version("ours"),
            }
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page() -> str:
    """The table of errors, a row for each model that was measured."""
    lines = [
        "# Predicted against measured latency",
        "",
        f"Cost tables predict {CHOICES} random joint choices of a width for every group and a scheme for every layer,",
        "float or int8, with one thread, in CPU time. The error is |predicted / measured - 1|; its bars are",
        f"{MEDIAN:.0%} (median) and {P90:.0%} (90th percentile). The repeat error compares two measurements of one",
        "program in separate rounds; a prediction cannot be expected to come below this noise. Written by",
        "`python -m benchmarks.predicted`.",
        "",
        "| model | runtime | programs (CPU time) | choices | float, full width | median error | 90th percentile "
        "| repeat: median | 90th percentile | below upper end | within the bars |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = load(ROWS)
    for name, (_, _, runtime) in CASES.items():
        own = [row for row in rows if row["model"] == name and "predicted" in row]
        if not own:
            lines.append(f"| {name} | {runtime} | | not measured | | | | | | | |")
            continue
        errors = np.array([abs(row["predicted"] / row["measured"] - 1) for row in own])
        repeats = np.array([abs(row["again"] / row["measured"] - 1) for row in own])
        median, p90 = np.median(errors), np.quantile(errors, 0.9)
        below = np.mean([row["measured"] <= row["upper"] for row in own])
        verdict = "yes" if median <= MEDIAN and p90 <= P90 else "no"
        lines.append(
            f"| {name.partition('-')[0]} | {runtime} | {own[-1]['programs']} ({own[-1]['seconds']} s) "
            f"| {len(own)} | "
            f"{own[-1]['reference_ms']:.2f} ms | {median:.1%} | {p90:.1%} | {np.median(repeats):.1%} | "
            f"{np.quantile(repeats, 0.9):.1%} | {below:.0%} | {verdict} |"
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
