"""Data for the plots of the page."""

from __future__ import annotations

from typing import Any

from torchslim.report.findings import labels, latency_entry, metric_entry, reported_split
from torchslim.report.numbers import (
    TO,
    byte_unit,
    is_measured,
    metric_text,
    significant,
    sized,
    spread,
    value_of,
    with_unit,
)
from torchslim.report.records import Row, Run


def common_unit(run: Run) -> tuple[str, int]:
    """Unit of size for all rows, and the unit's bytes."""
    return byte_unit(max((value_of(row["size_bytes"]) or 0 for row in run["rows"]), default=0))


def tradeoffs(run: Run) -> list[dict[str, Any]]:
    """Two plots, the metric against size and against latency, with a point for each row that has both figures."""
    unit, unit_bytes = common_unit(run)
    axis = metric_axis(run, reported_split(run))
    named = list(zip(labels(run["rows"]), run["rows"], strict=True))
    size_points = [
        point | {"x": size / unit_bytes, "text": sized(size)}
        for label, row in named
        if (point := _point(run, label, row)) and (size := value_of(row["size_bytes"])) is not None
    ]
    time_points = []
    for label, row in named:
        entry = latency_entry(run, row)
        point = _point(run, label, row)
        if point and is_measured(entry):
            median, low, high = spread(entry)
            time_points.append(
                point
                | {"x": entry["value"], "text": f"{median} [{low}{TO}{high}] ms"}
                | {"low": entry.get("low", entry["value"]), "high": entry.get("high", entry["value"])}
            )
    return [
        {"id": "plot-size", "title": "size", "x": f"size, {unit}", "y": axis, "points": size_points},
        {
            "id": "plot-latency",
            "title": "latency",
            "x": f"latency on {run['target']['runtime']}, ms",
            "y": axis,
            "points": time_points,
        },
    ]


def _point(run: Run, label: str, row: Row) -> dict[str, Any] | None:
    metric, unit = value_of(metric_entry(run, row)), run["metric"]["unit"]
    if metric is None:
        return None
    return {
        "label": label,
        "kind": row["kind"],
        "y": metric,
        "metric": with_unit(metric_text(metric, unit), unit),
    }


def histories(run: Run) -> list[dict[str, Any]]:
    """Plots of every step that trained: parts of the loss by epoch, and the validation metric by epoch."""
    plots = []
    for index, row in enumerate(run["rows"]):
        history = row["history"]
        if not history:
            continue
        keys = list(dict.fromkeys(key for epoch in history for key in epoch))
        losses = [key for key in keys if key.startswith(("loss", "penalty"))]
        where = [_where(epoch) for epoch in history]
        plots += [
            {
                "id": f"history-{index}-{kind}",
                "row": index,
                "x": "epoch",
                "y": title,
                "where": where,
                "lines": [{"name": _line_name(run, key), "y": [epoch.get(key) for epoch in history]} for key in chosen],
            }
            for kind, title, chosen in (
                ("loss", "loss", losses),
                ("val", metric_axis(run, "val"), ["val"] if "val" in keys else []),
            )
            if chosen
        ]
    return plots


def metric_axis(run: Run, split: str) -> str:
    """Axis title of the metric: "accuracy on val, %"."""
    name = f"{run['metric']['name']} on {split}"
    return f"{name}, {run['metric']['unit']}" if run["metric"]["unit"] else name


def _where(row: dict[str, float]) -> str:
    return ", ".join(f"{key} {row[key]:g}" for key in ("round", "epoch") if key in row)


def _line_name(run: Run, key: str) -> str:
    return run["metric"]["name"] if key == "val" else key.removeprefix("loss_")


def history_column(run: Run, key: str) -> str:
    """Heading of a history column."""
    if key == "val":
        return metric_axis(run, "val")
    if key == "lr":
        return "learning rate"
    if key == "since_best":
        return "epochs since the best"
    return f"loss: {key.removeprefix('loss_')}" if key.startswith("loss_") else key


def history_text(run: Run, key: str, value: float) -> str:
    """A figure of the history, rounded for display."""
    if key in ("epoch", "round", "since_best"):
        return f"{value:g}"
    return metric_text(value, run["metric"]["unit"]) if key == "val" else significant(value, 4)
