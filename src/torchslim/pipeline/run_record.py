"""Numbers as `run.json` keeps them: with unit, repeats, spread and machine, or the reason why there is none."""

from __future__ import annotations

from typing import Any

from torchslim.artifact.latency import Timings
from torchslim.runtimes import Deployed


def number(
    value: float,
    unit: str,
    *,
    repeats: int = 1,
    low: float | None = None,
    high: float | None = None,
    machine: str = "",
) -> dict[str, Any]:
    """A number with its unit; measured ones carry repeats, spread (p10, p90) and the machine."""
    found: dict[str, Any] = {"value": value, "unit": unit, "repeats": repeats}
    if low is not None and high is not None:
        found |= {"low": low, "high": high}
    return found | ({"machine": machine} if machine else {})


def not_measured(reason: str) -> dict[str, Any]:
    """In a number's place, with the reason."""
    return {"not_measured": reason}


def size(deployed: Deployed) -> dict[str, Any]:
    """The bytes that ship."""
    if deployed.size_bytes is None:
        return not_measured(f"runtime {deployed.runtime!r} has no file")
    return number(deployed.size_bytes, "bytes")


def _latency(timings: Timings, name: str) -> dict[str, Any]:
    found = timings.latency(name)
    return number(found.median, "ms", repeats=found.rounds, low=found.p10, high=found.p90, machine="this")


def _speedup(timings: Timings, name: str, base: str) -> dict[str, Any]:
    found = timings.speedup(name, base)
    rounds = len(timings.rounds[name])
    measured = number(found.median, "x", repeats=rounds, low=found.p10, high=found.p90, machine="this")
    return measured | {"verdict": found.verdict}


def _quotient(before: float | None, after: float | None) -> dict[str, Any]:
    return number(before / after, "x") if before and after else not_measured("the runtime has no file")


def compare_rows(rows: list[dict[str, Any]], timings: Timings, runtime: str) -> None:
    """Add to each row its latency, and what it gained over the baseline and over the row before, in bytes and speed.

    Candidates are named "INDEX/RUNTIME" by stage; the last row is the artifact, which is the last stage as it ships.
    """
    last = len(rows) - 2
    for index, row in enumerate(rows):
        stage, before = min(index, last), min(max(index - 1, 0), last)
        kinds = dict.fromkeys((runtime, "eager"))
        row["latency_ms"] = {kind: _latency(timings, f"{stage}/{kind}") for kind in kinds}
        row["speedup"] = {
            "over_baseline": _speedup(timings, f"{stage}/{runtime}", f"0/{runtime}"),
            "over_previous": _speedup(timings, f"{stage}/{runtime}", f"{before}/{runtime}"),
        }
        sizes = [rows[each]["size_bytes"].get("value") for each in (0, max(index - 1, 0), index)]
        row["shrink"] = {
            "over_baseline": _quotient(sizes[0], sizes[2]),
            "over_previous": _quotient(sizes[1], sizes[2]),
        }
