"""The demo's figures, measured: python -m benchmarks.demo [--max-minutes M]

Reads the run that `make demo` left, times the fp32 and the compressed model on every runtime in one interleaved run,
keeps each row of timings in benchmarks/demo.jsonl (a killed benchmark goes on), and writes benchmarks/demo.md and the
README's table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torchslim as ts
from torchslim.artifact.latency import Timings, compare
from torchslim.core.hardware import describe_machine
from torchslim.report import load_run, table

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "demo.jsonl", HERE / "demo.md"
README, MARK = HERE.parent / "README.md", "<!-- the demo's table, written by benchmarks/demo.py -->"
RUNTIMES = ("eager", "inductor", "onnxruntime")
REPEATS = 5
THREADS = 2


def candidates(run: Path) -> dict[str, ts.Deployed]:
    """fp32 and compressed, on each runtime."""
    stages = {"fp32": run / "work" / "00-baseline", "compressed": run}
    return {
        f"{name}, {runtime}": ts.load(folder, runtime=runtime, threads=THREADS)
        for name, folder in stages.items()
        for runtime in RUNTIMES
    }


def measure(run: Path, identity: dict[str, Any], max_minutes: float) -> list[dict[str, Any]]:
    """The stored rows of this run, and what is missing to `REPEATS` measured now."""
    stored = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    rows = [row for row in stored if row["identity"] == identity]
    stop = time.monotonic() + 60 * max_minutes
    if len(rows) >= REPEATS:
        return rows
    deployed = candidates(run)
    while len(rows) < REPEATS and time.monotonic() < stop:
        timings = compare(deployed, rounds=40, seconds=60)
        rows.append({"identity": identity, "rounds": {name: list(each) for name, each in timings.rounds.items()}})
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def page(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The Markdown page, from the run and the rows alone."""
    pooled = Timings({name: [t for row in rows for t in row["rounds"][name]] for name in rows[0]["rounds"]})
    first, last = run["rows"][0], run["rows"][-1]
    split = "test" if "value" in last["metric"]["test"] else "val"
    before, after = (row["metric"][split]["value"] for row in (first, last))
    smaller = first["size_bytes"]["value"] / last["size_bytes"]["value"]
    machine = describe_machine(THREADS)
    lines = [
        "# The demo, as measured",
        "",
        "Written by `make bench` after `make demo`; Fashion-MNIST, everything selected on validation and",
        f"reported on {split}. {machine['processor']}, {machine['instruction_set']}, {THREADS} threads, "
        f"torch {machine['versions']['torch']}, onnxruntime {machine['versions']['onnxruntime']}.",
        "",
        "```",
        table(run),
        "```",
        "",
        "## Bars",
        "",
        "| bar | measured | holds |",
        "| --- | --- | --- |",
        f"| int8 file at least 3.5x smaller than the fp32 ONNX file | {smaller:.2f}x | {_yes(smaller >= 3.5)} |",
        f"| at most 0.5 points lost on {split} | {before - after:+.2f} points ({before:.2f} -> {after:.2f}) "
        f"| {_yes(before - after <= 0.5)} |",
        "",
        "## Latency on every runtime, one interleaved run",
        "",
        f"Batch 1, {len(next(iter(pooled.rounds.values())))} rounds; speed-up over fp32 on the same runtime, from",
        "paired rounds; median [p10-p90].",
        "",
        "| model, runtime | latency ms | speed-up over fp32 there | speed-up over fp32 eager |",
        "| --- | --- | --- | --- |",
    ]
    for name in pooled.rounds:
        runtime = name.rpartition(", ")[2]
        took = pooled.latency(name)
        there, eager = pooled.speedup(name, f"fp32, {runtime}"), pooled.speedup(name, "fp32, eager")
        lines.append(
            f"| {name} | {took.value:.3f} [{took.p10:.3f}-{took.p90:.3f}] | {there.value:.2f}x "
            f"[{there.p10:.2f}-{there.p90:.2f}], {there.verdict} | {eager.value:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--max-minutes", type=float, default=10)
    arguments = parser.parse_args()
    if not (arguments.run / "run.json").exists():
        sys.exit(f"{arguments.run} holds no finished run; `make demo` makes it")
    run = load_run(arguments.run)
    manifest = json.loads((arguments.run / "artifact.json").read_text())
    rows = measure(arguments.run, {"model": manifest["files"]["model.onnx"], "machine": describe_machine(THREADS)},
                   arguments.max_minutes)  # fmt: skip
    PAGE.write_text(page(run, rows))
    text = README.read_text()
    before, rest = text.split(MARK, 1)
    README.write_text(f"{before}{MARK}\n```\n{table(run)}\n```\n{MARK}{rest.split(MARK, 1)[1]}")
    print(PAGE)


if __name__ == "__main__":
    main()
