"""torchslim beside what a user does by hand: python -m benchmarks.by_hand [--only JOB] [--seeds N] [--max-minutes M]

Every side gets the same trained model, data, epochs and seeds, and makes an ONNX file; all files are measured in the
same way. Rows are appended to benchmarks/by_hand/by_hand.jsonl, so that an interrupted benchmark continues;
benchmarks/by_hand.md is written from them. The other libraries are the extra `by_hand`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch

import torchslim as ts
from benchmarks.by_hand.jobs import FLOAT, JOBS, OURS, Job
from benchmarks.by_hand.lines import lines_of
from benchmarks.by_hand.page import page
from benchmarks.by_hand.paired import packed
from benchmarks.by_hand.serve import Served, accuracy, hits, latency, samples
from benchmarks.rows import Row, append, load, machine_named, version

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "by_hand.jsonl", HERE.parent / "by_hand.md"
PACKAGES = ("torch-pruning", "torchdistill", "fasterai", "onnxruntime", "torch")
TIMED = "latency"  # the side of rows that hold the rounds of all others
ROUNDS = 200
Key = tuple[str, int, str]


def planned(names: Iterable[str], seeds: Iterable[int]) -> list[Key]:
    """Every job, seed and side, the first seed of all jobs before the second of any."""
    return [(name, seed, side) for seed in seeds for name in names for side in (*JOBS[name].scripts, TIMED)]


def missing(rows: Iterable[Row], keys: Iterable[Key]) -> list[Key]:
    """Those without a row."""
    have = {(row["job"], row["seed"], row["side"]) for row in rows}
    return [key for key in keys if key not in have]


def script(job: Job, side: str) -> ModuleType:
    """The module of a side."""
    return importlib.import_module(f"benchmarks.by_hand.{job.scripts[side]}")


def lines(job: Job, side: str) -> int:
    """Lines that a user of this side writes besides the model and the data."""
    return lines_of(HERE / f"{job.scripts[side]}.py")


def counted(rows: Iterable[Row]) -> list[Row]:
    """The rows with the lines of the code as it stands."""
    return [row | ({} if row["side"] == TIMED else {"lines": lines(JOBS[row["job"]], row["side"])}) for row in rows]


def served(job: Job, side: str, path: Path) -> Served:
    """The file of a side, with what it needs before it is called."""
    serve = getattr(script(job, side), "serve", None)
    return Served(path, serve) if serve else Served(path)


def measure(job: Job, side: str, seed: int, folder: Path) -> Row:
    """The row of a side: what its file is worth on test, and what it took to make it."""
    model, task = job.load()
    row: Row = {"tried": []}
    torch.manual_seed(seed)
    start = time.perf_counter()
    try:
        with quiet():
            calibration = task.calibration or task.train
            last = seed if side == OURS else job.epochs
            path = script(job, side).run(model, task.train, task.val, calibration, last, folder)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is its row
        return row | {"reason": said(error)}
    row["minutes"] = (time.perf_counter() - start) / 60
    if side != OURS and seed == 0:
        row["tried"] = tried(job, side, folder)
    path = Path(path)
    file = served(job, side, path)
    row |= {"val": accuracy(hits(file, task, task.val))} | tested(file, task)
    return row | {"bytes": path.stat().st_size, "path": str(path.relative_to(folder))}


def tested(file: Served, task: ts.Task) -> Row:
    """The accuracy on test, and which of its samples are told right."""
    told = hits(file, task, task.test or task.val)
    return {"test": accuracy(told), "hits": packed(told.numpy()), "samples": len(told)}


def tried(job: Job, side: str, folder: Path) -> list[dict[str, str]]:
    """Errors of the calls that the side's guides suggest first."""
    model, task = job.load()
    found = []
    attempts = importlib.import_module("benchmarks.by_hand.tried").ATTEMPTS.get(job.scripts[side], lambda *_: {})
    for what, attempt in attempts(model, task.train, task.val, folder).items():
        try:
            with quiet():
                outcome = attempt()
            error = outcome if isinstance(outcome, str) else "no error"
        except Exception as raised:  # noqa: BLE001 - whatever a library raises is what is asked for
            error = said(raised)
        found.append({"what": what, "error": error})
    return found


def said(error: Exception) -> str:
    """An error in a line, without paths of this machine."""
    text = re.sub(r"\x1b\[\d+m", "", " ".join(str(error).split()))
    text = re.sub(r"(?<![:/])(/[\w.+-]+){2,}/", "", text)
    cause = re.search(r"##* Exception summary.*|Caused by.*", text) or re.search(r".*", text)
    return f"{type(error).__name__}: {cause[0][:240] if cause else text}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that a library prints."""
    with (
        Path(os.devnull).open("w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        yield


def timed(job: Job, name: str, seed: int, rows: Iterable[Row], work: Path) -> Row:
    """The row of the latencies of all files of a job and seed, and the float model's."""
    model, task = job.load()
    files = {}
    for row in rows:
        if (row["job"], row["seed"]) == (name, seed) and row.get("path"):
            files[row["side"]] = served(job, row["side"], place(work, name, seed, row["side"]) / row["path"])
    folder = place(work, name, seed, FLOAT)
    examples = [task.inputs(batch) for batch in islice(task.val, 3)]  # of several sizes, where the job has them
    deployed = ts.deploy(model.eval(), examples, runtime="onnxruntime", threads=1)
    path = ts.save(deployed, folder) / "model.onnx"
    given = samples(task)
    file = Served(path)
    result: Row = tested(file, task) | {"bytes": path.stat().st_size}
    return result | {"rounds": latency({FLOAT: file, **files}, given, ROUNDS), "load": os.getloadavg()[0]}


def place(work: Path, name: str, seed: int, side: str) -> Path:
    """An own folder of a row, empty when it is run again."""
    folder = work / name / str(seed) / side.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def versions() -> dict[str, str]:
    """Releases of the libraries of the other sides."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=JOBS, help="one job")
    parser.add_argument("--side", help="one side, or latency")
    parser.add_argument("--fresh", action="store_true", help="measure also what has a row")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="then nothing more is started")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the JSONL to go on with")
    parser.add_argument("--work", type=Path, default=Path(".data/by_hand"), help="where the files go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stop = time.monotonic() + 60 * arguments.max_minutes
    now = version("ours")  # of the source that is loaded, whatever is edited meanwhile
    keys = planned([arguments.only] if arguments.only else JOBS, range(arguments.seeds))
    keys = [key for key in keys if arguments.side in (None, key[2])]
    for name, seed, side in keys if arguments.fresh else missing(load(arguments.rows), keys):
        if time.monotonic() > stop:
            break
        row: Row = {"job": name, "seed": seed, "side": side, "version": now, "versions": versions(), "reason": ""}
        row["machine"] = machine_named()
        folder = place(arguments.work, name, seed, side)
        if side == TIMED:
            row |= timed(JOBS[name], name, seed, load(arguments.rows), arguments.work)
        else:
            shutil.rmtree(folder)
            row |= measure(JOBS[name], side, seed, place(arguments.work, name, seed, side))
        append(row, arguments.rows)
        print(name, seed, side, row["reason"] or f"{row['test']:.2f} % on test", file=sys.stderr, flush=True)
    if arguments.rows == ROWS:
        PAGE.write_text(page(counted(load(ROWS))))
        print(PAGE)


if __name__ == "__main__":
    main()
