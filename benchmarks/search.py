"""The search beside a grid of single techniques and random search, each with one budget: python -m benchmarks.search

The budget is samples trained and artifacts measured, and never time: a noisy machine must not decide. Three seeds; run
again, it goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchslim as ts
from benchmarks.rows import version
from benchmarks.search_page import LEVEL, METHODS, page
from examples.fashion_mnist import resnet
from examples.fashion_mnist import task as demo_task
from examples.fashion_mnist.data import Batches, splits
from examples.fashion_mnist.model import DEPTHS, Block, ResNet
from torchslim.artifact.latency_cache import LatencyTable
from torchslim.core.files import write_bytes
from torchslim.core.step import Step, Trains
from torchslim.pipeline.recipe import load_document, parse_document
from torchslim.tuning import make_space
from torchslim.tuning.choices import inside

HERE = Path(__file__).parent
RECIPE = Path("examples/fashion_mnist/search.toml")
SOLVED = Path("examples/fashion_mnist/solve.toml")
IMAGES, VALIDATION, TEST = 6_000, 2_000, 4_000  # of the sets; the baseline was trained on all of the first
EXAMPLES = 8  # images that are exported and compared
THREADS = 1  # of training and of the runtime: two processes with two threads each on two cores wait for each other
TRIALS = 20
SEEDS = (0, 1, 2)
SPARSITIES = (0.5, 0.2, 0.8, 0.35, 0.65, 0.275, 0.425, 0.575, 0.725)  # ever finer
WIDTHS = (0.5, 0.75, 0.35)
MEMBERS = 6  # trainings of the solved search: few and long
SHARES = {"solve": 1.0, "solve-fifth": 0.2}  # of the samples that the sampled search trains


class Counted:
    """Training batches that write down how many samples were drawn."""

    def __init__(self, batches: Batches, path: Path) -> None:
        self.batches, self.path = batches, path

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            with self.path.open("a") as file:
                file.write(f"{len(batch[1])}\n")
            yield batch

    @staticmethod
    def total(path: Path) -> int:
        """Samples drawn so far."""
        return sum(map(int, path.read_text().split())) if path.is_file() else 0


def task(count: Path) -> ts.Task:
    """The demo's, with fewer training images, which are counted."""
    count.parent.mkdir(parents=True, exist_ok=True)
    data = {
        name: tuple(split[:size] for split in splits()[name])
        for name, size in (("train", IMAGES), ("val", VALIDATION), ("test", TEST))
    }
    return ts.Task(
        train=Counted(Batches(data["train"], 128, augment=True), count),
        val=Batches(data["val"], 500),
        test=Batches(data["test"], 500),
        calibration=demo_task().calibration,
        metric="accuracy",
    )


def example() -> tuple[torch.Tensor]:
    """A few images of the validation set."""
    return (next(iter(Batches(splits()["val"], EXAMPLES)))[0],)


class Narrow(ResNet):
    """The demo's network with fewer channels everywhere."""

    def __init__(self, width: float) -> None:
        super().__init__()
        widths = [max(8, 8 * round(width * number / 8)) for number in (16, 32, 64, 160)]
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(2)
        )
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, (wide, depth) in enumerate(zip(widths[1:], DEPTHS, strict=True)):
            for index in range(depth):
                blocks.append(Block(before, wide, stride=2 if stage and not index else 1))
                before = wide
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, 10)


def singles() -> Iterator[tuple[str, list[Step]]]:
    """Each technique by itself: a grid that grows finer, with a training more than the search's recipes have."""
    options: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 5e-4}
    kd = ts.KD(temperature=4.0, alpha=0.9)
    yield "int8", [ts.Quantize("int8")]
    yield "int8", [ts.Quantize("int8", accuracy="best")]
    yield "int8", [ts.Quantize("int8", mode="qat", train=ts.Distill(epochs=3, lr=1e-4, response=kd))]
    for place, sparsity in enumerate(SPARSITIES):
        cut = ts.Prune(pattern="channel", sparsity=sparsity, of="macs", normalization="max")
        yield "prune", [cut, ts.Finetune(epochs=4, lr=0.01, **options)]
        if place % 3 == 1:
            torch.manual_seed(0)
            student = Narrow(WIDTHS[place // 3])
            yield "distilled small net", [ts.Distill(epochs=8, lr=0.05, student=student, response=kd, **options)]


def cost(steps: list[Step]) -> int:
    """Samples that the steps train on."""
    return IMAGES * sum(sum(step.trainings()) for step in steps if isinstance(step, Trains))


def measured(work: Path, folder: Path, technique: str, table: LatencyTable, reference: ts.Deployed) -> dict[str, Any]:
    """A point of the page from a saved artifact."""
    rows = json.loads((folder / "run.json").read_text())["rows"]
    drops = {
        split: rows[0]["metric"][split]["value"] - rows[-1]["metric"][split]["value"] for split in ("val", "test")
    }  # fmt: skip
    deployed = ts.load(folder)
    timing = table.measure({"it": deployed}, reference)["it"]
    return {
        "folder": str(folder.relative_to(work)),
        "structure": deployed.spec.structure,
        "technique": technique,
        "drop_val": drops["val"],
        "drop_test": drops["test"],
        "ratio": timing.ratio.value,
        "size": rows[-1]["size_bytes"]["value"] / rows[0]["size_bytes"]["value"],
    }


def timed_again(work: Path, rows: list[dict[str, Any]], table: LatencyTable, reference: ts.Deployed) -> None:
    """All points by one comparison, after the work is done: what was timed beside it is noisier."""
    points = [point for row in rows for point in row["points"]]
    places = {point["structure"]: work / point["folder"] for point in points}
    if not all(folder.is_dir() for folder in places.values()):
        return
    timings = table.measure(
        {key: ts.load(folder) for key, folder in places.items()}, reference, again=True, rounds=100, seconds=200.0
    )
    for point in points:
        point["ratio"] = timings[point["structure"]].ratio.value


def run_search(work: Path, seed: int) -> dict[str, Any]:
    """The search; what it spends is the budget of the others."""
    document = {**load_document(RECIPE), "seed": seed}
    document["threads"] = THREADS
    document["budget"] = {**document["budget"], "trials": TRIALS, "metric_drop": LEVEL}  # what the page counts
    folder, count = work / "search", work / "search.count"
    found = ts.search(resnet(), task(count), document, workdir=folder, example_inputs=example(), rehearse=False)
    tried = found.data["trials"]
    attempts = sum(1 + (each["stage"] != "cheap") for each in tried)
    folders = sorted((folder / "front").iterdir())
    return {"folders": folders, "samples": Counted.total(count), "artifacts": attempts + len(folders)}


def run_solved(work: Path, seed: int, samples: float, artifacts: float) -> dict[str, Any]:
    """The solved search, with so many trained samples and artifacts; its tables train nothing."""
    document = {**load_document(SOLVED), "seed": seed}
    document["threads"] = THREADS
    prune, distill, quantize = document["step"]
    document["step"] = [prune, {**distill, "epochs": max(1, round(samples / IMAGES / MEMBERS))}, quantize]
    limits = {"epochs": samples / IMAGES, "trials": round(artifacts), "metric_drop": LEVEL}
    document["budget"] = {**document["budget"], **limits}
    count = work.with_suffix(".count")
    found = ts.search(resnet(), task(count), document, workdir=work, example_inputs=example(), rehearse=False)
    folders = sorted((work / "front").iterdir())
    return {"folders": folders, "samples": Counted.total(count), "artifacts": len(found.data["trials"])}


def run_each(
    work: Path, name: str, candidates: Iterator[tuple[str, list[Step]]], samples: int, artifacts: int, seed: int
) -> Any:
    """Whole runs, one after the other, as long as the budget lasts."""
    count = work / f"{name}.count"
    folders, techniques = [], []
    spent = 0
    for index, (technique, steps) in enumerate(candidates):
        if spent + cost(steps) > samples or len(folders) == artifacts:
            continue
        spent += cost(steps)
        folder = work / name / f"{index:02d}"
        if not (folder / "run.json").is_file():
            result = ts.compress(
                resnet(), task(count), steps, threads=THREADS, example_inputs=example(), seed=seed,
                workdir=folder / "work", stages=work / f"{name}-stages", rehearse=False,
            )  # fmt: skip
            result.save(folder)
        folders.append(folder)
        techniques.append(technique)
    return {"folders": folders, "techniques": techniques, "samples": spent, "artifacts": len(folders)}


def drawn(seed: int) -> Iterator[tuple[str, list[Step]]]:
    """Recipes at random from the search's space; a combination that fails a check is drawn again."""
    import random

    space = make_space(load_document(RECIPE))
    generator = random.Random(seed)
    for _ in range(60):
        values: dict[str, Any] = {}
        for parameter in space.parameters:
            if parameter.kind == "choice":
                values[parameter.name] = generator.choice(parameter.choices)
            elif parameter.step:
                values[parameter.name] = parameter.low + parameter.step * generator.randint(
                    0, round((parameter.high - parameter.low) / parameter.step)
                )
            else:
                values[parameter.name] = generator.uniform(parameter.low, parameter.high)
        yield "random", list(space.recipe(values).steps)


def drawn_units(seed: int) -> Iterator[tuple[str, list[Step]]]:
    """Recipes at random from the solver's space: a width for each group, a scheme for each layer, the block or not."""
    import random

    generator = random.Random(seed)
    structure = ts.prune.inspect(resnet(), example())
    groups = [group for group in structure.groups if group.prunable]
    layers = [name for name, module in resnet().named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    distill, quantize = load_document(SOLVED)["step"][1:]
    for _ in range(60):
        gone = [block for block in structure.blocks if block.prunable and generator.random() < 0.5]
        modules = {module for block in gone for module in block.modules}
        widths = {
            next(iter(stay)): generator.randrange(8, group.width + 1, 8)
            for group in groups
            if (stay := [member for member in group.members if not inside(member, modules)])
        }
        share = generator.choice((0.0, 0.0, 0.3))  # of layers in float
        schemes = {name: "float" for name in layers if not inside(name, modules) and generator.random() < share}
        cut = {"do": "prune", "reconstruct": True}
        steps: list[dict[str, Any]] = [{**cut, "pattern": "channel", "criterion": "lamp", "widths": widths}]
        if gone:
            steps.insert(0, {**cut, "pattern": "block", "blocks": [block.name for block in gone]})
        document = {**load_document(SOLVED), "step": [*steps, distill, {**quantize, "layers": schemes}]}
        document.pop("budget")
        yield "random units", list(parse_document(document, "drawn").steps)


def main() -> None:
    """All methods and seeds, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".data/search"), help="a killed benchmark resumes from here")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows_path = HERE / "search.jsonl"

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in rows_path.read_text().splitlines()] if rows_path.is_file() else []

    reference = ts.deploy(resnet(), example(), threads=THREADS)
    table = LatencyTable("onnxruntime", THREADS, path=arguments.work / "latency.json")
    for seed in arguments.seeds:
        samples = artifacts = 0
        for method in METHODS:
            known = next((row for row in rows() if row["seed"] == seed and row["method"] == method), None)
            if known is None and method in arguments.methods:
                work = arguments.work / f"seed-{seed}"
                if method == "search":
                    done = run_search(work, seed)
                elif method in SHARES:
                    share = SHARES[method]
                    done = run_solved(work / method, seed, samples * share, artifacts * share)
                else:
                    candidates = {"singles": singles, "random": drawn, "random-units": drawn_units}[method]
                    given = () if method == "singles" else (seed,)
                    done = run_each(work, method, candidates(*given), samples, artifacts, seed)
                names = done.get("techniques") or [method] * len(done["folders"])
                points = [
                    measured(arguments.work, folder, technique, table, reference)
                    for folder, technique in zip(done["folders"], names, strict=True)
                ]
                known = {"seed": seed, "method": method, "samples": done["samples"], "artifacts": done["artifacts"],
                         "points": points, "version": version("ours")}  # fmt: skip
                with rows_path.open("a") as file:  # processes may share it, a seed each
                    file.write(json.dumps(known) + "\n")
                print(f"seed {seed}, {method}: {known['samples']} samples, {known['artifacts']} artifacts", flush=True)
            if method == "search":
                if known is None:
                    raise SystemExit(f"seed {seed}: the search comes first, as its samples are the others' budget")
                samples, artifacts = known["samples"], known["artifacts"]
    known_rows = rows()
    if len(known_rows) == len(SEEDS) * len(METHODS):
        timed_again(arguments.work, known_rows, table, reference)
        write_bytes(rows_path, "".join(json.dumps(each) + "\n" for each in known_rows).encode())
    (HERE / "search.md").write_text(page(known_rows))


if __name__ == "__main__":
    main()
