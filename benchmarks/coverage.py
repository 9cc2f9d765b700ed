"""How many models of the zoo can be pruned, beside Torch-Pruning: python -m benchmarks.coverage

Every model and side runs in a process of its own with a time limit. Rows are appended to benchmarks/coverage.jsonl, so
a killed benchmark goes on where it stopped; benchmarks/coverage.md is written from them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, append, load, version
from torchslim.machine import describe_machine

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "coverage.jsonl", HERE / "coverage.md"
SIDES = ("ours", "peer")
TIME_LIMIT = 180.0
GRACE = 480.0  # for building, checking and counting, besides the call
COMMAND = "python -m benchmarks.coverage"
COLUMNS = (
    "model", "side", "counts", "verified", "parameters", "ratio", "MACs", "ratio", "seconds", "peak MiB", "batch 1",
    "batch 3", "shapes", "backward", "as zeroed",
)  # fmt: skip


def latest(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """The newest row of each model and side."""
    return {(row["model"], row["side"]): row for row in rows}


def missing(
    names: Sequence[str],
    sides: Sequence[str],
    rows: Iterable[Row],
    versions: dict[str, str],
    fresh: bool = False,
    limit: float = 0.0,
) -> list[tuple[str, str]]:
    """What is to be run, model by model.

    Args:
        names: of the models wanted.
        sides: of them.
        rows: measured so far.
        versions: of each side now.
        fresh: rows of another version count as missing too.
        limit: of a call, in seconds; what ran into a shorter one is missing.
    """
    have = latest(rows)

    def stands(name: str, side: str) -> bool:
        row = have.get((name, side))
        if row is None or (fresh and row["version"] != versions[side]):
            return False
        return not (row["reason"].startswith("time limit") and row["time_limit"] < limit)

    return [(name, side) for name in names for side in sides if not stands(name, side)]


def run(name: str, side: str, limit: float) -> Row:
    """The row of one model and side, from a process of its own."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if side == "peer":  # as its timm example does: it traces attention operation by operation
        environment["TIMM_FUSED_ATTN"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.coverage", "--only", name, "--side", side, "--child", str(answer)]
        process = subprocess.Popen(
            [*command, "--time-limit", str(limit)],
            env=environment, cwd=HERE.parent, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            _, errors = process.communicate(timeout=limit + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return _failed(f"time limit of {limit:.0f} s")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if answer.exists():
            return json.loads(answer.read_text())  # type: ignore[no-any-return]
        if process.returncode < 0:
            return _failed(f"process ended by {signal.Signals(-process.returncode).name}")
        return _failed((errors.strip().splitlines() or ["process ended without a row"])[-1][:300])


def _failed(reason: str) -> Row:
    return {"verified": None, "counts": False, "reason": reason}


# the page -------------------------------------------------------------------------------------------------------------


def page(rows: Iterable[Row], machine: dict[str, Any]) -> str:
    """The Markdown page, from the rows and the machine alone."""
    have = latest(rows)
    models = sorted({name for name, _ in have})
    suites = sorted({name.partition("/")[0] for name in models}, key=lambda suite: (suite != "torchvision", suite))
    limits = sorted({row["time_limit"] for row in have.values()})
    lines = [
        "# Coverage of channel pruning",
        "",
        f"Written by `make coverage` (`{COMMAND}`); {machine['processor']}, {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}; time limit {', '.join(f'{limit:.0f} s' for limit in limits)} a call.",
        "Random weights, half of the channels of every layer asked for. A model *counts* when the result is verified,",
        "runs forward at batch 1 and 3 and backward, answers in the original's shapes, and has at least 1.5 times",
        "fewer parameters. Ours is verified by torchslim itself; the peer (Torch-Pruning, used as its examples do, the",
        "better of two ways where they show two) when its result runs and has the original's shapes. *As zeroed*: the",
        "result computes what the original does with the removed channels zeroed, in float64; only for models of",
        "convolutions, linear layers and batch norms, and it may differ without fault where channels are averaged.",
        "Seconds are of the call alone, on a machine that other work may share.",
        "",
        "Versions: " + "; ".join(_versions(have, side) for side in SIDES) + ".",
        "",
        "| suite | models | ours counts | peer counts | peer runs | peer as zeroed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for suite in suites:
        lines.append(_summary(suite, [name for name in models if name.startswith(f"{suite}/")], have))
    if len(suites) > 1:
        lines.append(_summary("all", models, have))
    for suite in suites:
        lines += ["", f"## {suite}", "", *_table([name for name in models if name.startswith(f"{suite}/")], have)]
    lines += ["", "## What does not count", ""]
    for side in SIDES:
        failed = [
            (name, have[name, side]) for name in models if (name, side) in have and not have[name, side]["counts"]
        ]
        if failed:
            lines += [f"### {side}", "", *(f"- `{name}`: {_escape(why(row))}" for name, row in failed), ""]
    return "\n".join(lines).rstrip() + "\n"


def _versions(have: dict[tuple[str, str], Row], side: str) -> str:
    found = Counter(row["version"] for (_, each), row in have.items() if each == side)
    return f"{side} " + (", ".join(f"{name} ({number} rows)" for name, number in found.most_common()) or "not measured")


def _summary(suite: str, names: Sequence[str], have: dict[tuple[str, str], Row]) -> str:
    ours, peer = ([have[name, side] for name in names if (name, side) in have] for side in SIDES)
    compared = [row["same_as_zeroed"] for row in peer if row.get("same_as_zeroed") is not None]
    cells = (
        _share(sum(row["counts"] for row in ours), len(ours)),
        _share(sum(row["counts"] for row in peer), len(peer)),
        _share(sum(bool(row["verified"]) for row in peer), len(peer)),
        _share(sum(compared), len(compared)),
    )
    return f"| {suite} | {len(names)} | {' | '.join(cells)} |"


def _share(number: int, total: int) -> str:
    return f"{number} of {total} ({100 * number / total:.0f} %)" if total else "not measured"


def _table(names: Sequence[str], have: dict[tuple[str, str], Row]) -> list[str]:
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for name in names:
        for side in SIDES:
            if (row := have.get((name, side))) is None:
                continue
            runs = row.get("runs") or {}
            cells = [
                name.partition("/")[2], side, _yes(row["counts"]), _yes(row["verified"]),
                _change(row, "parameters"), _ratio(row, "parameters"), _change(row, "macs"), _ratio(row, "macs"),
                _number(row.get("seconds"), 1, "{:.1f}"), _number(row.get("peak_bytes"), 2**20, "{:.0f}"),
                *(_yes(runs.get(each)) for each in ("batch 1", "batch 3", "shapes", "backward")),
                _yes(row.get("same_as_zeroed")),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _yes(value: Any) -> str:
    return value if isinstance(value, str) else {True: "yes", False: "**no**", None: "-"}[value]


def _number(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else form.format(value / unit)


def _change(row: Row, what: str) -> str:
    values = (_number(row.get(f"{what}_{when}"), 1e6, "{:.2f}") for when in ("before", "after"))
    return " -> ".join(values) + " M"


def _ratio(row: Row, what: str) -> str:
    before, after = row.get(f"{what}_before"), row.get(f"{what}_after")
    return f"{before / after:.2f}x" if before and after else "-"


def why(row: Row) -> str:
    """Why a row does not count, in a line."""
    if row.get("reason"):
        return str(row["reason"])
    if row.get("verified") is False:
        return "; ".join(["not verified", *row.get("reasons", ())[:3]])
    if (row.get("ratio") or 0) < 1.5:
        reasons = f": {'; '.join(row['reasons'][:3])}" if row.get("reasons") else ""
        return f"only {row.get('ratio') or 1:.2f}x fewer parameters{reasons}"
    return "does not run as the original does"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="one model, as suite/model or as part of its name")
    parser.add_argument("--suite", choices=("torchvision", "timm", "transformers"))
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--limit", type=int, help="at most this many runs")
    parser.add_argument("--fresh", action="store_true", help="run what was measured on other source again")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds a call")
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="the JSONL to go on with")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        from benchmarks.one_model import measure
        from benchmarks.zoo import find

        arguments.child.write_text(json.dumps(measure(find(arguments.only), arguments.side, arguments.time_limit)))
        return
    from benchmarks.zoo import names as zoo_names

    wanted = [name for name in zoo_names() if name.startswith(arguments.suite or "")]
    if arguments.only:
        wanted = [name for name in wanted if name == arguments.only] or [n for n in wanted if arguments.only in n]
    sides = (arguments.side,) if arguments.side else SIDES
    versions = {side: version(side) for side in sides}
    stop = time.monotonic() + 60 * arguments.max_minutes
    threads = describe_machine()["threads"]
    todo = missing(wanted, sides, load(arguments.rows), versions, arguments.fresh, arguments.time_limit)
    todo = todo[: arguments.limit]
    for number, (name, side) in enumerate(todo, 1):
        if time.monotonic() > stop:
            break
        row = {"model": name, "suite": name.partition("/")[0], "side": side, "version": versions[side]}
        row |= run(name, side, arguments.time_limit) | {"time_limit": arguments.time_limit, "threads": threads}
        append(row, arguments.rows)
        print(f"{number}/{len(todo)} {name} {side}: {'counts' if row['counts'] else why(row)}", flush=True)
    target = arguments.rows.with_suffix(".md")
    target.write_text(page(load(arguments.rows), describe_machine()))
    print(target)


if __name__ == "__main__":
    main()
