"""How long channel pruning takes, beside Torch-Pruning: python -m benchmarks.speed

Every model's pairs run in a process of their own, and each peak of memory in another. Rows are appended to
benchmarks/speed.jsonl, so a killed benchmark goes on where it stopped; benchmarks/speed.md is written from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.one_speed import PEER_LIMIT, THREADS, memory, pairs
from benchmarks.peer import RATIO
from benchmarks.rows import append, load, version
from benchmarks.zoo import find
from torchslim.core.hardware import describe_machine

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "speed.jsonl", HERE / "speed.md"
COMMAND = "python -m benchmarks.speed"
RESNETS = ("resnet18", "resnet50", "resnet152")
BARRED = ("resnet50", "densenet121", "vit_b_16", "convnext_tiny", "mobilenet_v3_large")
MODELS = tuple(dict.fromkeys((*RESNETS, *BARRED)))
TASKS = ("pair", "whole", "forward")  # what the rows of each process are
THINGS = {"analysis": "Analysis: which channels go together", "whole": "The whole call"}
STEEPEST = 1.1  # the exponent of time over nodes that still passes for linear, with some noise
COPIES = 3  # of the model that the whole call may hold, besides a forward pass
Row = dict[str, Any]


def missing(names: Sequence[str], rows: Iterable[Row], now: str) -> list[tuple[str, str]]:
    """The models and tasks without rows of this version."""
    have = {(row["model"], row["what"]) for row in rows if row["version"] == now}
    return [(name, task) for name in names for task in TASKS if (name, task) not in have]


def run(name: str, task: str, count: int) -> list[Row]:
    """The rows of one model and task, from a process of its own."""
    # threads that wait must not keep others, of this machine's other work too, from the processor
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.speed", "--only", name, "--task", task, "--child", str(answer)]
        done = subprocess.run(
            [*command, "--pairs", str(count)],
            env=environment, cwd=HERE.parent, check=False, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{name} {task}: {(done.stderr.strip().splitlines() or ['no rows'])[-1]}")
        return json.loads(answer.read_text())  # type: ignore[no-any-return]


# the page -------------------------------------------------------------------------------------------------------------


def page(rows: Sequence[Row], machine: dict[str, Any], peer: str) -> str:
    """The Markdown page, from the rows, the machine and the peer's release alone."""
    short = [row | {"model": row["model"].rpartition("/")[2]} for row in rows]
    models = list(dict.fromkeys([name for name in MODELS if any(row["model"] == name for row in short)]))
    loads = [row["load"] for row in short if row["what"] == "pair"]
    lines = [
        "# Speed of channel pruning",
        "",
        f"Written by `{COMMAND}`; {machine['processor']}, {THREADS} threads, torch {machine['versions']['torch']}; "
        f"{peer}.",
        "torchvision's models with random weights, one image of 3 x 224 x 224,"
        f" {100 * RATIO:.0f} % of the channels of every layer.",
        "Ours and the peer (Torch-Pruning, as its examples use it) run in turn in one process per model; a ratio is of"
        " a pair,",
        "ours over the peer's, so below 1 ours is faster. Shown is the median, and in brackets the 10th to the 90th"
        " percentile.",
        f"Peers past {PEER_LIMIT:.0f} s are stopped. The load of the machine was {min(loads, default=0):.1f} to"
        f" {max(loads, default=0):.1f} while pairs ran"
        + ("; above its threads, seconds are too high, and ratios are what to read." if _busy(loads) else "."),
    ]
    notes = {
        "analysis": "Ours finds every group: *recording* is copies of the model and a forward pass under a dispatch"
        " mode, which stands in for an\nexport, *after* makes groups of what it saw. The peer builds its pruner with"
        " its dependency graph; listing its groups comes on top,\nand is shown beside. The bar is for the time after"
        " the recording; the first verdict is that of all of it.",
        "whole": "Ours verifies the result in float64, operation by operation, and leaves the model as it was; the peer"
        " prunes in place\nand verifies nothing.",
    }
    for thing, title in THINGS.items():
        lines += ["", f"## {title}", "", notes[thing], "", *_times(models, short, thing)]
    lines += ["", "## Growth", "", *_growth(models, short)]
    lines += ["", "## Forward passes and memory", "", *_passes_and_memory(models, short)]
    return "\n".join(lines) + "\n"


def _busy(loads: Sequence[float]) -> bool:
    return float(np.median(loads)) > THREADS + 0.5 if loads else False


def _times(models: Sequence[str], rows: Sequence[Row], thing: str) -> list[str]:
    analysis = thing == "analysis"
    extra = ("recording s", "after s", "after over the peer's", "at most the peer's", "peer's groups s")
    more = extra if analysis else ()
    lines = _head("model", "ours s", "peer s", "ratio", "pairs", "at most the peer's", *more)
    for name in models:
        mine = _pairs(rows, name, thing)
        both = [row for row in mine if row.get("peer")]
        ratios = [row["ours"] / row["peer"] for row in both]
        cells = [
            _spread([row["ours"] for row in mine]),
            _spread([row["peer"] for row in both]) or next((row["reason"] for row in mine if row["reason"]), "-"),
            _spread(ratios) or "-",
            str(len(both)),
            _verdict(name, ratios),
        ]
        if analysis:
            cells += [_spread([row[part] for row in mine]) for part in ("record", "after")]
            after = [row["after"] / row["peer"] for row in both]
            cells += [_spread(after) or "-", _verdict(name, after), _spread([row["groups"] for row in both]) or "-"]
        lines.append(_line(name, *cells))
    return lines


def _verdict(name: str, ratios: Sequence[float]) -> str:
    if not ratios:
        return "no peer"
    met = float(np.median(ratios)) <= 1
    return ("met" if met else "**missed**") if name in BARRED else ("yes" if met else "no")


def _growth(models: Sequence[str], rows: Sequence[Row]) -> list[str]:
    found = {name: mine for name in RESNETS if name in models and (mine := _pairs(rows, name, "analysis"))}
    lines = _head("model", "nodes", "analysis ms per node", "after the recording ms per node")
    for name, mine in found.items():
        each = [[1000 * row[part] / row["nodes"] for row in mine] for part in ("ours", "after")]
        lines.append(_line(name, str(mine[0]["nodes"]), *map(_spread, each)))
    if len(found) > 1:
        nodes = [mine[0]["nodes"] for mine in found.values()]
        steep, after = (
            exponent(nodes, [float(np.median([row[part] for row in mine])) for mine in found.values()])
            for part in ("ours", "after")
        )
        met = "met" if max(steep, after) <= STEEPEST else "**missed**"
        lines += [
            "",
            f"Fitted, the time grows with the nodes of the recorded graph to the power of {steep:.2f}, and after the"
            f" recording of {after:.2f};",
            f"no worse than linear (at most {STEEPEST} for both): {met}.",
        ]
    return lines


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log time over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _passes_and_memory(models: Sequence[str], rows: Sequence[Row]) -> list[str]:
    lines = _head("model", "passes", "weights MiB", "a forward MiB", "whole call MiB", "allowed MiB", "bar")
    counts = set()
    for name in models:
        last = {row["what"]: row for row in rows if row["model"] == name}
        if not {"passes", "whole", "forward"} <= last.keys():
            continue
        whole, forward = last["whole"], last["forward"]
        counts.add(last["passes"]["passes"])
        allowed = COPIES * whole["weights"] + forward["peak"]
        sizes = (whole["weights"], forward["peak"], whole["peak"], allowed)
        met = "met" if whole["peak"] <= allowed else "**missed**"
        lines.append(_line(name, str(last["passes"]["passes"]), *(f"{size / 2**20:.0f}" for size in sizes), met))
    constant = "met" if len(counts) == 1 else "**missed**"
    return [
        f"The number of runs of the model and its copies in a whole call is the same for every model: {constant}.",
        "Memory is the peak above what the process held before, the model among it; a whole call may take"
        f" {COPIES} times the weights",
        "and what a forward pass takes (float32, without gradients).",
        "",
        *lines,
    ]


def _pairs(rows: Sequence[Row], name: str, thing: str) -> list[Row]:
    return [row for row in rows if row["model"] == name and row["what"] == "pair" and row["thing"] == thing]


def _spread(values: Sequence[float]) -> str:
    if not len(values):
        return ""
    low, middle, high = np.percentile(values, (10, 50, 90))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "| --- " * len(cells) + "|"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, help="one model")
    parser.add_argument("--pairs", type=int, default=5, help="of ours and the peer's, after the warm-up")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the JSONL to go on with")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        entry = find(f"torchvision/{arguments.only}")
        rows = pairs(entry, arguments.pairs) if arguments.task == "pair" else memory(entry, arguments.task)
        arguments.child.write_text(json.dumps(rows))
        return
    now = version("ours")
    names = [f"torchvision/{name}" for name in ([arguments.only] if arguments.only else MODELS)]
    for name, task in missing(names, load(arguments.rows), now):
        print(f"{name} {task}", flush=True)
        for row in run(name.rpartition("/")[2], task, arguments.pairs):
            append(row | {"version": now}, arguments.rows)
    target = arguments.rows.with_suffix(".md")
    kept = [row for row in load(arguments.rows) if row["version"] == now]
    target.write_text(page(kept, describe_machine(), version("peer")))
    print(target)


if __name__ == "__main__":
    main()
