"""How many models of the zoo can be pruned, beside Torch-Pruning: python -m benchmarks.coverage

Every model and side runs in a process of its own with a time limit. Rows are appended to benchmarks/coverage.jsonl, so
a killed benchmark goes on where it stopped; benchmarks/coverage.md is written from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.rows import Row
from benchmarks.runner import Benchmark, escape, latest, main, versions_of

SIDES = ("ours", "peer")
COMMAND = "python -m benchmarks.coverage"
COLUMNS = (
    "model", "side", "counts", "verified", "parameters", "ratio", "MACs", "ratio", "seconds", "peak MiB", "batch 1",
    "batch 3", "shapes", "backward", "as zeroed",
)  # fmt: skip


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
        "Seconds are of the call alone, on a machine that other work may share. The same models in int8:",
        "[the coverage of quantization](coverage_quantize.md).",
        "",
        "Versions: " + "; ".join(f"{side} {versions_of(have, side) or 'not measured'}" for side in SIDES) + ".",
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
            lines += [f"### {side}", "", *(f"- `{name}`: {escape(why(row))}" for name, row in failed), ""]
    return "\n".join(lines).rstrip() + "\n"


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


# ----------------------------------------------------------------------------------------------------------------------

BENCHMARK = Benchmark(
    module="benchmarks.coverage",
    measure="benchmarks.one_model:measure",
    sides=SIDES,
    time_limit=180.0,
    grace=480.0,  # for building, checking and counting, besides the call
    empty={"verified": None, "counts": False},
    page=page,
    why=why,
    # as its timm example does: it traces attention operation by operation
    environment={"peer": {"TIMM_FUSED_ATTN": "0"}},
)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
