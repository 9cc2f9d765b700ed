"""What the coverage benchmarks share: every model and side in a process of its own, rows that can be gone on with."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, append, load, version
from torchslim.core.hardware import describe_machine
from torchslim.core.imports import resolve

HERE = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark over the zoo.

    Args:
        module: what `python -m` runs.
        measure: "module:function" of an entry of the zoo, a side and the seconds allowed; it gives a row.
        sides: who is measured; the first is ours.
        time_limit: seconds, by default.
        grace: seconds besides, before the process is ended.
        empty: a row that holds nothing but its reason.
        page: the Markdown page, from the rows and the machine.
        why: why a row does not count, in a line.
        environment: variables of a side's process, besides `OFFLINE`.
        order: where a name stands among those to be run.
        preload: modules that every process starts with.
    """

    module: str
    measure: str
    sides: Sequence[str]
    time_limit: float
    grace: float
    empty: Mapping[str, Any]
    page: Callable[[Iterable[Row], dict[str, Any]], str]
    why: Callable[[Row], str]
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    order: Callable[[str], Any] | None = None
    preload: Sequence[str] = ()

    @property
    def rows(self) -> Path:
        """The JSONL of its rows; the page lies beside it."""
        return HERE / f"{self.module.rpartition('.')[2]}.jsonl"


def latest(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """The newest row of each model and side."""
    return {(row["model"], row["side"]): row for row in rows}


def versions_of(have: Mapping[tuple[str, str], Row], side: str) -> str:
    """The versions that a side's rows are of, with how many; empty without rows."""
    found = Counter(row["version"] for (_, each), row in have.items() if each == side)
    return ", ".join(f"{name} ({number} rows)" for name, number in found.most_common())


def escape(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def missing(
    names: Sequence[str],
    sides: Sequence[str],
    rows: Iterable[Row],
    versions: dict[str, str],
    fresh: bool = False,
    limit: float = 0.0,
    failed: bool = False,
) -> list[tuple[str, str]]:
    """What is to be run, model by model.

    Args:
        names: of the models wanted.
        sides: of them.
        rows: measured so far.
        versions: of each side now.
        fresh: rows of another version count as missing too.
        limit: of a call, in seconds; what ran into a shorter one is missing.
        failed: rows of another version that do not count are missing too.
    """
    have = latest(rows)

    def stands(name: str, side: str) -> bool:
        row = have.get((name, side))
        if row is None:
            return False
        if row["version"] != versions[side] and (fresh or (failed and not row["counts"])):
            return False
        return not (row["reason"].startswith("time limit") and row["time_limit"] < limit)

    return [(name, side) for name in names for side in sides if not stands(name, side)]


def run(benchmark: Benchmark, name: str, side: str, limit: float) -> Row:
    """The row of one model and side, from a process of its own."""

    def failed(reason: str) -> Row:
        return {**benchmark.empty, "reason": reason}

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(benchmark.preload))
    with tempfile.TemporaryDirectory() as folder:
        answer, errors = Path(folder) / "row.json", Path(folder) / "errors"
        environment = {**OFFLINE, **benchmark.environment.get(side, {})}
        process = context.Process(target=_child, args=(benchmark.measure, name, side, limit, folder, environment))
        process.start()
        assert process.pid is not None
        try:
            process.join(limit + benchmark.grace)
        finally:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                timed_out = True
            else:
                timed_out = False
        if timed_out:
            return failed(f"time limit of {limit:.0f} s")
        if answer.exists():
            return json.loads(answer.read_text())  # type: ignore[no-any-return]
        if process.exitcode < 0:
            return failed(f"process ended by {signal.Signals(-process.exitcode).name}")
        said = errors.read_text().strip().splitlines() if errors.exists() else []
        return failed((said or ["process ended without a row"])[-1][:300])


def _child(measure: str, name: str, side: str, limit: float, folder: str, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    with (Path(folder) / "errors").open("w") as errors, Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        from benchmarks.zoo import find

        row = resolve(measure, "the measurement")(find(name), side, limit)
        answer = Path(folder) / "row.tmp"
        answer.write_text(json.dumps(row))
        answer.rename(Path(folder) / "row.json")


def main(benchmark: Benchmark, about: str | None) -> None:
    """Measure what is missing, then write the page."""
    from benchmarks.zoo import SUITES

    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="one model, as suite/model or as part of its name")
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--side", choices=benchmark.sides)
    parser.add_argument("--limit", type=int, help="at most this many runs")
    parser.add_argument("--fresh", action="store_true", help="run what was measured on other source again")
    parser.add_argument("--failed", action="store_true", help="run what failed on other source again")
    parser.add_argument("--time-limit", type=float, default=benchmark.time_limit, help="seconds a call")
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    parser.add_argument("--rows", type=Path, default=benchmark.rows, help="the JSONL to go on with")
    arguments = parser.parse_args()
    todo = _wanted(benchmark, arguments)
    versions = {side: version(side) for _, side in todo}
    stop = time.monotonic() + 60 * arguments.max_minutes
    threads = describe_machine()["threads"]
    for number, (name, side) in enumerate(todo, 1):
        if time.monotonic() > stop:
            break
        row = {"model": name, "suite": name.partition("/")[0], "side": side, "version": versions[side]}
        row |= run(benchmark, name, side, arguments.time_limit)
        row |= {"time_limit": arguments.time_limit, "threads": threads}
        append(row, arguments.rows)
        said = "counts" if row["counts"] else benchmark.why(row)
        print(f"{number}/{len(todo)} {name} {side}: {said}", flush=True)
    target = arguments.rows.with_suffix(".md")
    target.write_text(benchmark.page(load(arguments.rows), describe_machine()))
    print(target)


def _wanted(benchmark: Benchmark, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    from benchmarks.zoo import names as zoo_names

    wanted = [name for name in zoo_names() if name.startswith(arguments.suite or "")]
    if arguments.only:
        wanted = [name for name in wanted if name == arguments.only] or [n for n in wanted if arguments.only in n]
    if benchmark.order is not None:
        wanted.sort(key=benchmark.order)
    sides = (arguments.side,) if arguments.side else tuple(benchmark.sides)
    versions = {side: version(side) for side in sides}
    rows = load(arguments.rows)
    todo = missing(wanted, sides, rows, versions, arguments.fresh, arguments.time_limit, arguments.failed)
    return todo[: arguments.limit]
