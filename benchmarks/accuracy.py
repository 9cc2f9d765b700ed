"""What quantization costs in accuracy, on trained weights: python -m benchmarks.accuracy [--max-minutes M]

Three trained models are quantized in every way that suits them, and the converted model is measured. Rows are appended
to benchmarks/accuracy.jsonl, so a killed benchmark goes on where it stopped; benchmarks/accuracy.md is written from
them. The sentences and the series come in packages; what is missing is named with the command that gets it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import torchslim as ts
from benchmarks.accuracy_data import PACKAGES, DataMissing, find
from benchmarks.accuracy_models import SUBJECTS, Loaded, embed
from benchmarks.accuracy_page import page
from benchmarks.rows import Row, append, load, version
from torchslim.core.hardware import describe_machine
from torchslim.core.isolation import copy_model
from torchslim.quantize import sqnr

ROWS = Path(__file__).with_suffix(".jsonl")
EXAMPLES = 16  # samples that the model is exported with, and each layer's noise measured on
Key = tuple[str, str, int]


def planned(names: Iterable[str]) -> list[Key]:
    """Every model, way and seed."""
    keys = [(name, way, seed) for name in names for way in SUBJECTS[name].ways for seed in SUBJECTS[name].seeds(way)]
    late = ("qat", "adaround")  # the dearest come last, and of those one seed after the other

    def place(key: Key) -> tuple[int, int]:
        return max((number for number, each in enumerate(late, 1) if each in key[1]), default=0), key[2]

    return sorted(keys, key=place)


def missing(rows: Iterable[Row], keys: Iterable[Key]) -> list[Key]:
    """Those without a row."""
    have = {(row["model"], row["way"], row["seed"]) for row in rows}
    return [key for key in keys if key not in have]


@lru_cache(maxsize=8)
def loaded(name: str, seed: int) -> Loaded:
    """A trained model with its data."""
    return SUBJECTS[name].load(seed)


@lru_cache(maxsize=8)
def float_outputs(name: str, seed: int, split: str) -> tuple[Tensor, Tensor]:
    """What the float model answers, and the labels."""
    found = loaded(name, seed)
    return embed(found.model, found.task, split)


def measure(name: str, way: str, seed: int, now: str) -> Row:
    """The row of one way: accuracies in percent, noise and cosine of the outputs against the float model's."""
    subject = SUBJECTS[name]
    found = loaded(name, seed if subject.seeded else 0)
    row: Row = {"model": name, "way": way, "seed": seed, "version": now, "reason": ""}
    step, model = subject.ways[way], found.model
    inputs = tuple(input_[:EXAMPLES] for input_ in found.task.inputs(next(iter(found.task.val))))
    start = time.perf_counter()
    if step is not None:
        ctx = ts.Context(task=found.task, teacher=found.model, example_inputs=inputs, seed=seed)
        try:
            outcome = step(copy_model(found.model)[0], ctx)
        except Exception as error:  # noqa: BLE001 - whatever a way may raise is its row
            return row | {"reason": f"{type(error).__name__}: {error}"}
        model = outcome.model
        row |= {"notes": sorted({layer.reason for layer in outcome.layers if layer.reason})}
        if outcome.history:
            row["val_trained"] = outcome.history[-1]["val"]
    row["seconds"] = time.perf_counter() - start
    for split in ("val", "test"):
        reference, labels = float_outputs(name, seed if subject.seeded else 0, split)
        outputs = reference if step is None else embed(model, found.task, split)[0]
        row[split] = found.accuracy(outputs, labels)
        if step is not None:
            row[f"sqnr_{split}"] = sqnr(reference, outputs)
            row[f"cosine_{split}"] = float(torch.cosine_similarity(reference, outputs, dim=-1).mean())
    if way in subject.on_runtime:
        deployed = ts.deploy(model, inputs, runtime="onnxruntime", threads=1)
        outputs, labels = embed(deployed, found.task, "test")
        row["test_runtime"] = found.accuracy(outputs, labels)
    return row


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SUBJECTS, help="one model")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="then nothing more is started")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the JSONL to go on with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        for start in PACKAGES:
            find(start)
    except DataMissing as error:
        sys.exit(str(error))
    stop = time.monotonic() + 60 * arguments.max_minutes
    now = version("ours")  # of the source that is loaded, whatever is edited meanwhile
    todo = missing(load(arguments.rows), planned([arguments.only] if arguments.only else SUBJECTS))
    for number, key in enumerate(todo, 1):
        if time.monotonic() > stop:
            break
        row = measure(*key, now)
        append(row, arguments.rows)
        what = row["reason"] or f"{row['val']:.2f} % on validation, {row['test']:.2f} % on test"
        print(f"{number}/{len(todo)} {' '.join(map(str, key))}: {what}", flush=True)
    target = arguments.rows.with_suffix(".md")
    target.write_text(page(load(arguments.rows), describe_machine()))
    print(target)


if __name__ == "__main__":
    main()
