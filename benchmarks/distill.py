"""What distillation brings a small student, and what it costs: python -m benchmarks.distill [--max-minutes M]

First KD's settings are chosen on validation, with a seed of their own; then every loss trains once, and labels alone,
KD, DKD and the feature and relation loss that are best on validation train with five seeds each. Rows are appended to
benchmarks/distill.jsonl, so a killed benchmark goes on where it stopped; benchmarks/distill.md is written from them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

import torchslim as ts
from benchmarks.accuracy_data import DataMissing, find
from benchmarks.distill_cost import costs
from benchmarks.distill_models import COUPLES, LABELS, TRIED, ways
from benchmarks.distill_page import page
from benchmarks.rows import Row, append, load, version
from torchslim.core.batches import predictor
from torchslim.core.hardware import describe_machine
from torchslim.distill.losses.registry import FEATURES, RELATIONS

ROWS = Path(__file__).with_suffix(".jsonl")
SEEDS = range(5)
TRIAL_SEED = 100  # of the choice of settings; never reported
COST = "cost"


def train(couple: str, way: ts.Finetune | ts.Distill, seed: int, *, tested: bool) -> Row:
    """Train a student from new weights: its accuracies in percent."""
    found = COUPLES[couple]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = found.student()
    data = found.task()
    inputs = data.inputs(next(iter(data.val)))
    ctx = ts.Context(task=data, teacher=found.teacher(), model=student, example_inputs=inputs, seed=seed)
    start = time.perf_counter()
    outcome = way(student, ctx)
    row: Row = {"seconds": time.perf_counter() - start, "losses": dict(outcome.history[-1])}
    splits = ("val", "test") if tested else ("val",)
    return row | {split: data.evaluate(predictor(outcome.model), split) for split in splits}


def best(rows: Iterable[Row], couple: str, names: Iterable[str]) -> str | None:
    """The way of these that is best on validation with the first seed; None until all have run."""
    mine = [row for row in rows if row["couple"] == couple and row["seed"] == SEEDS[0]]
    done = {row["way"]: row["val"] for row in mine if "val" in row}  # a cost has none
    names = list(names)
    return max(names, key=lambda name: done[name]) if all(name in done for name in names) else None


def chosen_kd(rows: Iterable[Row], couple: str) -> ts.KD | None:
    """The settings that are best on validation; None until all were tried."""
    tried = {row["way"]: row["val"] for row in rows if row["couple"] == couple and row["seed"] == TRIAL_SEED}
    return TRIED[max(TRIED, key=lambda name: tried[name])] if set(TRIED) <= set(tried) else None


def todo(rows: list[Row], couple: str) -> list[tuple[str, int]]:
    """What can be run now, and has not been."""
    have = {(row["way"], row["seed"]) for row in rows if row["couple"] == couple}
    kd = chosen_kd(rows, couple)
    if kd is None:
        return [(name, TRIAL_SEED) for name in TRIED if (name, TRIAL_SEED) not in have]
    names = ways(couple, kd)
    wanted = [(name, SEEDS[0]) for name in names]
    several = [LABELS, "kd", "dkd"]
    for kind in (FEATURES, RELATIONS):
        found = best(rows, couple, [name for name in names if name.removeprefix("kd + ") in kind])
        several += [found] if found else []
    wanted += [(name, seed) for seed in SEEDS for name in several]
    return [key for key in dict.fromkeys(wanted) if key not in have]


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*COUPLES, COST))
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="then nothing more is started")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the JSONL to go on with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stop = time.monotonic() + 60 * arguments.max_minutes
    now = version("ours")
    for couple in COUPLES if arguments.only is None else {arguments.only} & set(COUPLES):
        try:
            find("aeon")
        except DataMissing as error:
            sys.exit(str(error))
        while (missing := todo(load(arguments.rows), couple)) and time.monotonic() < stop:
            name, seed = missing[0]
            kd = chosen_kd(load(arguments.rows), couple)
            way = ways(couple, kd)[name] if kd else ts.Distill(response=TRIED[name], **COUPLES[couple].training)
            row = {"couple": couple, "way": name, "seed": seed, "version": now}
            row |= train(couple, way, seed, tested=kd is not None)
            append(row, arguments.rows)
            said = f"{row['val']:.2f} % on validation, {row['seconds']:.0f} s"
            print(f"{len(missing)} left: {couple}, {name}, seed {seed}: {said}", flush=True)
    have = {(row["couple"], row["way"]) for row in load(arguments.rows)}
    if arguments.only in (None, COST) and time.monotonic() < stop:
        for row in costs(have):
            append(row | {"version": now}, arguments.rows)
            print(f"{row['couple']}, {row['way']}: {statistics.median(row['ratios']):.3f}", flush=True)
    target = arguments.rows.with_suffix(".md")
    target.write_text(page(load(arguments.rows), describe_machine()))
    print(target)


if __name__ == "__main__":
    main()
