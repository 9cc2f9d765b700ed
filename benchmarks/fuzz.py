"""Mutated inputs of every kind in `tests.mutations`, longer than the suite: python -m benchmarks.fuzz --minutes 10

Batches run in child processes under a watch: an example must be accepted or refused with a `TorchslimError`. Any other
exception, more than 5 s of processor time, growth over 1 GiB and the death of the process are faults. Every batch is
appended to benchmarks/fuzz.jsonl, also one that the end of the time or a signal cuts off; run again, further seeds are
drawn. benchmarks/fuzz.md is written from the batches of the newest version.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import reprlib
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import torchslim
from benchmarks.rows import Row, append, load, version
from tests.mutations import KINDS, Kind
from tests.mutations.artifacts import GOOD, KINDS_OF_GOOD, good
from torchslim.core.hardware import describe_machine
from torchslim.errors import TorchslimError

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "fuzz.jsonl", HERE / "fuzz.md"
BATCH = 250  # examples of a child process
SECONDS = 5  # of processor time, for one example, children of its own included
SILENCE = 60  # seconds of the clock without a word from a child
GROWTH = 2**30  # bytes of address space that one child may take on top of what it starts with
FAULTS = ("raw", "hang", "growth", "death")
STOPPED = "a child process that ran it ended"  # what a refusal says where a runtime would have ended the process
NO_MEMORY = re.compile(r"MemoryError|bad_alloc|[Cc]an(no|')t allocate memory|DefaultCPUAllocator")
SHOWN = 20  # faults that the page lists, for each kind
SOURCE = str(Path(torchslim.__file__).parent)


class Hang(BaseException):
    """An example has had its time; no `except Exception` may catch it."""


class Stop(BaseException):
    """The whole process was told to end."""


# before all batches ---------------------------------------------------------------------------------------------------


def warm_up() -> None:
    """Import and make once what all children share.

    The runtimes make their good artifacts in a child, since a process that forks must not have threads of theirs.
    """
    torch.set_num_threads(1)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: theirs.send({name: good(name) for name in KINDS_OF_GOOD})
    )
    child.start()
    theirs.close()
    GOOD.update(ours.recv())
    child.join()
    import onnxruntime  # noqa: F401
    import openvino  # noqa: F401

    for kind in KINDS.values():  # tables of hypothesis and files of the kinds
        _examples(kind, 0, 2, lambda _: None)


def _examples(kind: Kind, number: int, count: int, use: Callable[[Any], None]) -> None:
    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, phases=(Phase.generate,),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(kind.examples)
    def run(example: Any) -> None:
        use(example)

    run()


# a batch --------------------------------------------------------------------------------------------------------------


def short(kind: Kind, example: Any) -> str:
    """An example as a line of text, without its depths."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxdict, brief.maxlist, brief.maxstring, brief.maxother = 8, 16, 8, 80, 120
    return (brief.repr(example) if kind.shown is repr else kind.shown(example))[:1_500]


def where(error: BaseException) -> str:
    """The innermost line of ours."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(SOURCE)]
    return f"{Path(frames[-1].filename).relative_to(SOURCE)}:{frames[-1].lineno}" if frames else "outside of torchslim"


def tried(kind: Kind, example: Any) -> tuple[str, str, float]:
    """What became of one example, of what kind the error was, and the seconds of processor time."""
    start = sum(os.times()[:4])
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        outcome, about = _outcome(kind, example)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = sum(os.times()[:4]) - start
    if outcome in ("accepted", "refused") and seconds > SECONDS:  # signals wait while a library computes
        return "hang", f"{seconds:.0f} s, then {outcome}", seconds
    return outcome, about, seconds


def _outcome(kind: Kind, example: Any) -> tuple[str, str]:
    try:
        kind.attempt(example)
        return "accepted", ""
    except TorchslimError as error:
        if _without_memory(error):
            return "growth", f"{type(error).__name__}: {str(error)[:300]}"
        return "refused", type(error).__name__ + " (a crash in a child process)" * (STOPPED in str(error))
    except MemoryError as error:
        return "growth", where(error)
    except Hang as error:
        return "hang", where(error)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        return "raw", f"{type(error).__name__} in {where(error)}: {str(error)[:300]}"


def _without_memory(error: BaseException | None) -> bool:
    """Was the error made of one that says that memory was missing?"""
    seen: set[int] = set()  # the chain of a reraised error may end in itself
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def address_space() -> int:
    """Bytes of address space that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def batch(name: str, number: int, count: int, channel: Any) -> None:
    """Try examples and tell of each: ("at", text), then ("done", outcome, about, seconds)."""
    kind = KINDS[name]

    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, stop)
    for each in (signal.SIGINT, signal.SIGTERM):  # the parent decides
        signal.signal(each, signal.SIG_IGN)
    limit = address_space() + GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends

    def use(example: Any) -> None:
        channel.send(("at", short(kind, example)))
        channel.send(("done", *tried(kind, example)))

    _examples(kind, number, count, use)
    channel.send(("end",))


def watched(name: str, number: int, count: int, end: float) -> Row:
    """A batch in a child process, as a row; what is not tried at `end` of the clock, or at a signal, is left out."""
    ours, theirs = multiprocessing.Pipe()
    # forked: what is imported once serves all children
    child = multiprocessing.get_context("fork").Process(target=batch, args=(name, number, count, theirs))
    start, at, outcomes, slowest = time.monotonic(), "", Counter[str](), 0.0
    kinds: Counter[str] = Counter()
    faults: list[Row] = []
    stopped = False
    child.start()
    theirs.close()

    def fault(outcome: str, about: str) -> None:
        outcomes[outcome] += 1
        faults.append({"outcome": outcome, "about": about, "example": at, "seed": number})

    try:
        while True:
            last = time.monotonic()
            while not ours.poll(max(0.0, min(1.0, end - time.monotonic()))):
                if time.monotonic() > end or time.monotonic() > last + SILENCE:
                    break
            if time.monotonic() > end:
                break
            if not ours.poll():
                fault("hang", f"no answer within {SILENCE} s")
                break
            try:
                told = ours.recv()
            except (EOFError, ConnectionResetError):
                child.join()
                fault("death", f"exit code {child.exitcode}")
                break
            if told[0] == "end":
                child.join(SILENCE)
                break
            if told[0] == "at":
                at = told[1]
                continue
            _, outcome, about, seconds = told
            slowest = max(slowest, seconds)
            if outcome in FAULTS:
                fault(outcome, about)
            else:
                outcomes[outcome] += 1
                kinds.update([about] if about else [])
    except Stop:
        stopped = True
    if child.is_alive():
        child.kill()
    child.join()
    ours.close()
    return {
        "kind": name, "seed": number, "version": version("ours"), "outcomes": dict(outcomes), "errors": dict(kinds),
        "slowest_seconds": slowest, "seconds": time.monotonic() - start, "faults": faults[:SHOWN],
        **({"stopped": True} if stopped else {}),
    }  # fmt: skip


# the page -------------------------------------------------------------------------------------------------------------


def page(rows: Iterable[Row], machine: dict[str, Any]) -> str:
    """The Markdown page, from the rows and the machine alone."""
    rows = list(rows)
    newest = rows[-1]["version"] if rows else "none"
    rows = [row for row in rows if row["version"] == newest]
    lines = [
        "# Mutated inputs",
        "",
        f"Written by `python -m benchmarks.fuzz`; {machine['processor']}, torch {machine['versions']['torch']}, "
        f"torchslim {newest}.",
        "Good inputs with one to three mutations each (`tests/mutations`): values of other types and sizes, missing,",
        "unknown and misspelled keys, moved and repeated parts. Every example must be accepted (used, or passed over",
        "as a stage or trial that is not whole) or refused with a `TorchslimError`. A library that crashes on a file",
        f"may end a child process only. Faults: any other exception (*raw*), more than {SECONDS} s of processor time",
        f"(*hang*), more than {GROWTH // 2**30} GiB of memory besides (*growth*), the death of the process (*death*).",
        "",
        "| kind | examples | accepted | refused | raw | hang | growth | death | slowest | errors |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = sorted({row["kind"] for row in rows})
    for name in names:
        mine = [row for row in rows if row["kind"] == name]
        outcomes, errors = (sum((Counter(row[key]) for row in mine), Counter()) for key in ("outcomes", "errors"))
        counts = [f"{outcomes[each]:,}" for each in ("accepted", "refused", *FAULTS)]
        told = ", ".join(f"{kind} {count:,}" for kind, count in errors.most_common())
        slowest = max(row["slowest_seconds"] for row in mine)
        lines.append(
            f"| {name} | {outcomes.total():,} | {' | '.join(counts)} | {slowest:.2f} s | {told or 'none'} |"
        )  # fmt: skip
    for group in sorted({KINDS[name].group for name in names if name in KINDS}):
        mine = [row for row in rows if row["kind"] in KINDS and KINDS[row["kind"]].group == group]
        outcomes = sum((Counter(row["outcomes"]) for row in mine), Counter())
        counts = [f"{outcomes[each]:,}" for each in ("accepted", "refused", *FAULTS)]
        slowest = max(row["slowest_seconds"] for row in mine)
        lines.append(f"| **all {group}** | {outcomes.total():,} | {' | '.join(counts)} | {slowest:.2f} s | |")
    found = {name: [each for row in rows if row["kind"] == name for each in row["faults"]] for name in names}
    if any(found.values()):
        lines += ["", "## Faults"]
    for name, faults in found.items():
        if faults:
            lines += ["", f"{name}, by kind, with how many and one example:", ""]
        groups: dict[tuple[str, str], list[Row]] = {}
        for fault in faults:
            groups.setdefault((fault["outcome"], fault["about"].partition(":")[0]), []).append(fault)
        for (outcome, _), alike in sorted(groups.items(), key=lambda group: -len(group[1]))[:SHOWN]:
            first = alike[0]
            lines.append(
                f"- {outcome} ({len(alike)}), {first['about']}; seed {first['seed']}: `{first['example'][:400]}`"
            )
    return "\n".join(lines) + "\n"


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Inside, a signal that asks for the end raises `Stop`."""

    def stop(*_: object) -> NoReturn:
        raise Stop

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Stop:
        print("stopped between two batches")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a fault was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="for all kinds together; the default is 1")
    parser.add_argument("--examples", type=int, help="stop with so many of each kind, counting those of this version")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="only this one; may be repeated")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of rows; the page lies beside it")
    given = parser.parse_args(arguments)
    end, ours, found = time.monotonic() + 60 * given.minutes, version("ours"), False
    done: Counter[str] = Counter()
    seeds: Counter[str] = Counter()
    for row in load(given.rows):
        if row["version"] == ours:
            done[row["kind"]] += sum(row["outcomes"].values())
            seeds[row["kind"]] = max(seeds[row["kind"]], row["seed"] + 1)
    names = list(given.kind or KINDS)
    with tempfile.TemporaryDirectory(prefix="torchslim-fuzz-") as cache, told_to_stop():
        os.environ["XDG_CACHE_HOME"] = cache  # nothing of the user's is read or left behind
        warm_up()
        while names and time.monotonic() < end:
            for name in list(names):
                if time.monotonic() > end or (given.examples is not None and done[name] >= given.examples):
                    names.remove(name)
                    continue
                count = BATCH if given.examples is None else min(BATCH, given.examples - done[name])
                row = watched(name, seeds[name], count, end)
                append(row, given.rows)
                if row.get("stopped"):
                    end = 0.0
                done[name] += sum(row["outcomes"].values())
                seeds[name] += 1
                for fault in row["faults"]:
                    found = True
                    print(
                        f"{name}: {fault['outcome']}: {fault['about']}\n    seed {fault['seed']}: "
                        f"{fault['example'][:300]}"
                    )
    given.rows.with_suffix(".md").write_text(page(load(given.rows), describe_machine(None)))
    for name in given.kind or KINDS:
        print(f"{name}: {done[name]} examples of version {ours}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
