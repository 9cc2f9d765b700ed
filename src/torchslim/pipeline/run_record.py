"""Numbers as `run.json` stores them: with unit, repeats, spread and machine, or the reason why one is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchslim.artifact.assembled import AnyDeployed
from torchslim.artifact.latency import Timings, resized
from torchslim.core.measurement import Measurement
from torchslim.graph.io_structure import leaf_names
from torchslim.runtimes import Deployed


def number(value: float, unit: str, *, machine: str = "") -> dict[str, Any]:
    """Return a number with its unit, as `run.json` stores it."""
    return Measurement(value=value, unit=unit, machine=machine).to_dict()


def not_measured(reason: str) -> dict[str, Any]:
    """Return the entry that replaces a missing number, with the reason."""
    return {"not_measured": reason}


def size(deployed: AnyDeployed) -> dict[str, Any]:
    """Return the size of the deployed file in bytes."""
    if deployed.size_bytes is None:
        return not_measured(f"runtime {deployed.runtime!r} has no file")
    return number(deployed.size_bytes, "bytes")


def _quotient(before: float | None, after: float | None) -> dict[str, Any]:
    return number(before / after, "x") if before and after else not_measured("the runtime has no file")


def shapes_of(deployed: Deployed, leaves: Sequence[Tensor]) -> str:
    """The shapes of a timed call by input, such as "input_ids (1, 12)"."""
    names = leaf_names(deployed.spec.inputs)
    sized = resized(deployed, inputs=leaves)
    return ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in zip(names, sized, strict=True))


def compare_rows(
    rows: list[dict[str, Any]],
    timings: Timings,
    runtime: str,
    parts: Sequence[str] = (),
    largest: Timings | None = None,
) -> None:
    """Add latencies to the rows, and their gains in bytes and speed over the baseline and over the previous row.

    Timings are named "INDEX/RUNTIME" by stage, and "INDEX/RUNTIME/PART" for parts of a model; the last row is the
    artifact, which is the last stage as it ships. Those of the largest inputs stand beside those of the median-size
    ones, where sizes vary.
    """
    last = len(rows) - 2
    for index, row in enumerate(rows):
        stage, before = min(index, last), min(max(index - 1, 0), last)
        kinds = dict.fromkeys((runtime, "eager"))
        for end, timed in (("", timings), ("_largest", largest)):
            if timed is not None:
                row[f"latency{end}_ms"] = {kind: timed.latency(f"{stage}/{kind}").to_dict() for kind in kinds}
                row[f"speedup{end}"] = {
                    "over_baseline": timed.speedup(f"{stage}/{runtime}", f"0/{runtime}").to_dict(),
                    "over_previous": timed.speedup(f"{stage}/{runtime}", f"{before}/{runtime}").to_dict(),
                }
        row["latency_ms"] |= {
            f"{kind}, part {path}": timings.latency(f"{stage}/{kind}/{path}").to_dict()
            for kind in kinds
            for path in parts
            if f"{stage}/{kind}/{path}" in timings.rounds  # the runtime may not take a further program of a part
        }
        sizes = [rows[place]["size_bytes"].get("value") for place in (0, max(index - 1, 0), index)]
        row["shrink"] = {
            "over_baseline": _quotient(sizes[0], sizes[2]),
            "over_previous": _quotient(sizes[1], sizes[2]),
        }
