"""Which criterion prunes channels best, beside Torch-Pruning: python -m benchmarks.prune [--jobs 2] [--max-minutes M]

The demo's baseline on Fashion-MNIST is cut to half and to a quarter of its multiply-accumulates and finetuned, in the
same way for every criterion. Stages follow each other: all criteria with their default options; the options of the
best; the best with several seeds. Each picks by validation accuracy. Rows are appended to benchmarks/prune.jsonl, so a
killed benchmark goes on where it stopped; benchmarks/prune.md is written from them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from benchmarks.one_cut import Run, measure, unpruned
from benchmarks.prune_page import page
from benchmarks.prune_plan import EPOCHS, Found, missing, stages
from benchmarks.rows import append, load
from examples.fashion_mnist.data import locate
from torchslim.core.hardware import describe_machine

ROWS = Path(__file__).parent / "prune.jsonl"


def execute(todo: Sequence[Run], path: Path, jobs: int, stop: float) -> None:
    """Run and append, `jobs` at a time, and start no more when the time is over."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, run, path) for run in todo]
        for number, future in enumerate(as_completed(futures), 1):
            if future.canceled():
                continue
            row = future.result()
            append(row, path)
            what = row["reason"] or f"{row['macs_left']:.3f} of the MACs, {row['val']:.2f} % on validation"
            options = f"{row['normalization']} {row['reduction']} {row['sparsity']} seed {row['seed']}"
            print(f"{number}/{len(todo)} {row['side']} {row['criterion']} {options}: {what}", flush=True)
            if time.monotonic() > stop:
                pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of finetuning")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="then no more runs are started")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the JSONL to go on with")
    arguments = parser.parse_args()
    if locate() is None:
        sys.exit("Fashion-MNIST cannot be had here; put its four files in a folder and name it in TORCHSLIM_DATA")
    stop = time.monotonic() + 60 * arguments.max_minutes
    if not Found(load(arguments.rows)).baseline:
        append(unpruned(), arguments.rows)
    for stage in stages(arguments.epochs):
        found = Found(load(arguments.rows), arguments.epochs)
        todo = missing(stage(found), found)
        if todo and time.monotonic() < stop:
            execute(todo, arguments.rows, arguments.jobs, stop)
    target = arguments.rows.with_suffix(".md")
    target.write_text(page(load(arguments.rows), describe_machine(), arguments.epochs))
    print(target)


if __name__ == "__main__":
    main()
