"""The page of the gallery's benchmark, from its rows."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.rows import Row
from torchslim.report.numbers import sized

POINTS, PERCENT = 1.0, 1.0  # most that an artifact may lose: points of a percentage, per cent of another metric
SMALLER = 3.0  # times


def latest(rows: Iterable[Row]) -> dict[str, Row]:
    """The newest row of each job; one that counts comes before one that failed."""
    found: dict[str, Row] = {}
    for row in rows:
        if not row["reason"] or found.get(row["job"], {"reason": "x"})["reason"]:
            found[row["job"]] = row
    return found


def lost(row: Row) -> float:
    """How much worse the artifact's metric on test is: in points of a percentage, else in per cent of the metric."""
    sign = 1 if row["metric"]["higher_is_better"] else -1
    before, after = row["float"]["test"], row["artifact"]["test"]
    difference: float = sign * (before - after)
    return difference if row["metric"]["unit"] == "%" else 100 * difference / abs(before)


def misses(row: Row) -> list[str]:
    """Bars that a job misses, in words; empty if it keeps all."""
    found = []
    if lost(row) > (POINTS if row["metric"]["unit"] == "%" else PERCENT):
        found.append(f"loses {lost(row):.2f}")
    if (ratio := row["float"]["bytes"] / row["artifact"]["bytes"]) < SMALLER:
        found.append(f"only {ratio:.2f} times fewer bytes")
    if row["speedup"]["verdict"] != "faster":
        found.append(f"time: {row['speedup']['verdict']}")
    return found


def page(rows: Iterable[Row], torch_version: str) -> str:
    """The Markdown page."""
    found = latest(rows)
    jobs = [row for row in found.values() if not row["reason"]]
    lines = [
        "# The gallery: whole jobs, float against the artifact",
        "",
        f"Written by `python -m benchmarks.jobs`; torch {torch_version}. The last column names the source of torchslim",
        "and the processor of each row. Each machine trains the baselines anew, so their metrics differ.",
        "Every job is a folder of [examples/](../examples) with the recipe that ran here as it is. Both sides run on",
        "the same runtime with one thread. The time is that of the processor for one sample, the speed-up the median",
        "of paired rounds with the 10th and 90th percentile. A model with deployed parts is timed whole, with its code",
        "in Python, on its first batch. Everything is selected on val and reported on test.",
        *_suggestions(jobs),
        "*Minutes* are those of the whole recipe with its measurements, on a machine that others used, too; *lines* is",
        "the code of the model, the data and the task. [by_hand.md](by_hand.md) compares three of the jobs with what a",
        "user does by hand, with other libraries.",
        "",
        "| job | metric on test | float | artifact | bytes of float | artifact | smaller | ms of float "
        "| artifact | faster | minutes | lines | measured on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_line, jobs),
        "",
        "## Bars",
        "",
        f"An artifact may lose {POINTS:g} point ({PERCENT:g} % of a metric that is no percentage), must have "
        f"{SMALLER:g} times fewer bytes, and must be faster than its float artifact.",
        "",
        "| job | verdict | what `torchslim suggest` says |",
        "| --- | --- | --- |",
        *(f"| {row['job']} | {'; '.join(misses(row)) or 'met'} | {' '.join(row['suggested'][2:])} |" for row in jobs),
    ]
    if failed := [row for row in found.values() if row["reason"]]:
        lines += ["", "Not measured:", "", *(f"- {row['job']}: {row['reason']}" for row in failed)]
    return "\n".join(lines) + "\n"


def _suggestions(jobs: Iterable[Row]) -> list[str]:
    """A line about suggestions that were derived on other source than their row."""
    later = {row.get("suggested_version", row["version"]) for row in jobs} - {row["version"] for row in jobs}
    return [f"Some suggestions were derived later, on {', '.join(sorted(later))}."] if later else []


def _line(row: Row) -> str:
    before, after, speedup, unit = row["float"], row["artifact"], row["speedup"], row["metric"]["unit"]
    cells = [
        row["job"],
        row["metric"]["name"],
        f"{before['test']:.2f} {unit}".strip(),
        f"{after['test']:.2f} {unit}".strip(),
        sized(before["bytes"]),
        sized(after["bytes"]),
        f"{before['bytes'] / after['bytes']:.2f}x",
        f"{row['latency_ms']['float']:.3f}",
        f"{row['latency_ms']['artifact']:.3f}",
        f"{speedup['value']:.2f}x [{speedup['low']:.2f}-{speedup['high']:.2f}], {speedup['verdict']}",
        f"{row['minutes']:.1f}",
        str(row["lines"]),
        f"{row['version']}, {row['machine']}",
    ]
    return f"| {' | '.join(cells)} |"
