"""A run as one HTML page that needs nothing but itself: no network, no fonts, no other file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torchslim.report import charts
from torchslim.report.findings import (
    Ceiling,
    Layer,
    Row,
    Run,
    batch_words,
    ceilings,
    gains,
    gaps,
    labels,
    latency_entry,
    layers,
    metric_change,
    metric_entry,
    provenance,
    reported_split,
    summary,
    warnings,
)
from torchslim.report.html import fill, machine_facts
from torchslim.report.numbers import (
    TIMES,
    TO,
    Entry,
    counted,
    exact,
    faster,
    in_unit,
    metric_text,
    ratio_text,
    significant,
    sized,
    smaller,
    spread,
    value_of,
    with_unit,
)

Write = Callable[[float], str]
OPEN_LAYERS = 40  # a longer table of layers starts folded


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A table cell: what the eye reads, and the exact number as it stands in the run."""

    field: str
    entry: Entry
    text: str
    note: str = ""
    tone: str = ""

    @property
    def data(self) -> dict[str, str]:
        """The exact JSON numbers, by HTML attribute."""
        names = {"value": "data-value", "low": "data-low", "high": "data-high", "repeats": "data-repeats"}
        return {names[key]: json.dumps(self.entry[key]) for key in names if key in self.entry}

    @property
    def title(self) -> str:
        """The tooltip: all digits, unit, repeats and spread, or why there is no number."""
        if "not_measured" in self.entry:
            return f"not measured: {self.entry['not_measured']}"
        text = with_unit(exact(self.entry["value"]), self.entry["unit"])
        if "low" in self.entry:
            text += f"; p10 {exact(self.entry['low'])}, p90 {exact(self.entry['high'])}"
        return f"{text}; repeats: {self.entry['repeats']}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the table of steps."""

    name: str
    unit: str = ""


def render(run: dict[str, Any]) -> str:
    """The run as a self-contained HTML page.

    The page loads nothing: its Content-Security-Policy forbids every request, and every script but its own.

    Args:
        run: what `run.json` holds.
    """
    columns, rows = _steps(run)
    return fill(
        "page.html.j2",
        ("plot.js", "page.js"),
        run=run,
        data={"tradeoffs": charts.tradeoffs(run), "histories": charts.histories(run)},
        model=run["recipe"].get("model"),
        split=reported_split(run),
        runtime=run["target"]["runtime"],
        summary=summary(run),
        provenance=provenance(run),
        batch=batch_words(run),
        path=[label for label, row, _ in rows if row["kind"] == "step"] or ["baseline"],
        tiles=_tiles(run),
        columns=columns,
        rows=rows,
        gaps=gaps(run, _measurable(run)),
        gains=[(gain, _took(gain.seconds)) for gain in gains(run)],
        ceilings=[(ceiling, _ceiling(ceiling)) for ceiling in ceilings(run)],
        warnings=warnings(run),
        layers=[_layer(layer) for layer in layers(run)],
        layers_open=len(layers(run)) <= OPEN_LAYERS,
        layer_words=_layer_words(layers(run)),
        trainings=_trainings(run),
        recipe=json.dumps(run["recipe"], indent=2, ensure_ascii=False),
        machines=machine_facts(run["machines"]),
    )


def _steps(run: Run) -> tuple[list[Column], list[tuple[str, Row, list[Cell]]]]:
    """The columns and rows of the table of steps."""
    rows, metric, runtime = run["rows"], run["metric"], run["target"]["runtime"]
    reported = reported_split(run)
    others = [split for split in rows[0]["metric"] if split != reported]
    unit, unit_bytes = charts.common_unit(run)
    # what the reader came for stands first: a narrow window shows the rest on scrolling
    columns = [
        Column(name=f"{metric['name']} on {reported}", unit=metric["unit"]),
        Column(name="Size", unit=unit),
        Column(name="Smaller", unit=f"{TIMES}, over baseline"),
        Column(name=f"Latency on {runtime}", unit=f"ms, p10{TO}p90"),
        Column(name="Speed-up", unit=f"{TIMES}, over baseline"),
        *([Column(name="Latency, eager", unit=f"ms, p10{TO}p90")] if runtime != "eager" else []),
        Column(name="Non-zero"),
        Column(name="Parameters"),
        Column(name="MACs", unit="per sample" if run["batch"] == 1 else "per call"),
        *(Column(name=f"{metric['name']} on {split}", unit=metric["unit"]) for split in others),
    ]
    found = []
    for label, row in zip(labels(rows), rows, strict=True):
        cells = [
            _cell(f"metric.{reported}", metric_entry(run, row), _metric_writer(run)),
            _cell("size_bytes", row["size_bytes"], lambda size: in_unit(size, unit_bytes)),
            _cell("shrink.over_baseline", row["shrink"]["over_baseline"], ratio_text),
            _timed(f"latency_ms.{runtime}", latency_entry(run, row)),
            _speedup(row),
        ]
        if runtime != "eager":
            cells.append(_timed("latency_ms.eager", row["latency_ms"].get("eager", {"not_measured": "no figure"})))
        cells += [_cell(key, row[key], counted) for key in ("nonzero", "parameters", "macs")]
        cells += [_cell(f"metric.{split}", _split(row, split), _metric_writer(run)) for split in others]
        found.append((label, row, cells))
    return columns, found


def _split(row: Row, split: str) -> Entry:
    entry: Entry = row["metric"].get(split, {"not_measured": f"no figure on {split}"})
    return entry


def _metric_writer(run: Run) -> Write:
    return lambda value: metric_text(value, run["metric"]["unit"])


def _cell(field: str, entry: Entry, write: Write) -> Cell:
    value = value_of(entry)
    if value is None:
        return Cell(field=field, entry=entry, text="not measured", tone="absent")
    return Cell(field=field, entry=entry, text=write(value))


def _timed(field: str, entry: Entry) -> Cell:
    if value_of(entry) is None:
        return Cell(field=field, entry=entry, text="not measured", tone="absent")
    median, low, high = spread(entry)
    return Cell(field=field, entry=entry, text=median, note=f"{low}{TO}{high}" if "low" in entry else "")


def _speedup(row: Row) -> Cell:
    """A difference within the spread is none, whatever the median says."""
    entry, field = row["speedup"]["over_baseline"], "speedup.over_baseline"
    ratio = value_of(entry)
    if ratio is None:
        return Cell(field=field, entry=entry, text="not measured", tone="absent")
    if row["kind"] == "baseline":
        return Cell(field=field, entry=entry, text=ratio_text(ratio))
    around = f"{ratio_text(entry['low'])}{TO}{ratio_text(entry['high'])}" if "low" in entry else ""
    if entry["verdict"] == "no difference":
        return Cell(field=field, entry=entry, text="no difference", note=f"{ratio_text(ratio)}, {around}", tone="none")
    tone = "good" if ratio > 1 else "bad"
    return Cell(field=field, entry=entry, text=f"{ratio_text(ratio)} {entry['verdict']}", note=around, tone=tone)


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The run at a glance: heading, figure, and how it came about."""
    first, last = run["rows"][0], run["rows"][-1]
    unit, runtime = run["metric"]["unit"], run["target"]["runtime"]

    def write_metric(value: float) -> str:
        return with_unit(metric_text(value, unit), unit)

    old, new = (value_of(metric_entry(run, row)) for row in (first, last))
    before, after = (value_of(row["size_bytes"]) for row in (first, last))
    nonzero = [value_of(row["nonzero"]) for row in (first, last)]
    speedup = last["speedup"]["over_baseline"]
    absent = size = speed = "not measured"
    if before is not None and after is not None:
        size = "same size" if before == after else smaller(before, after).replace(" times ", f"{TIMES} ")
    if value_of(speedup) is not None:
        verdict = str(speedup["verdict"])
        speed = verdict if verdict == "no difference" else faster(speedup["value"]).replace(" times ", f"{TIMES} ")
    return [
        (
            f"{run['metric']['name']} on {reported_split(run)}",
            absent if new is None else write_metric(new),
            metric_change(run, first, last) + ("" if old is None else f", was {write_metric(old)}"),
        ),
        ("size of what ships", size, _from_to((before, after), sized)),
        (
            f"latency on {runtime}",
            speed,
            _from_to(
                [value_of(latency_entry(run, row)) for row in (first, last)],
                lambda it: f"{significant(it)} ms",
            ),
        ),
        (
            "weights that are not zero",
            absent if nonzero[1] is None else counted(nonzero[1]),
            _from_to(nonzero, counted),
        ),
    ]


def _from_to(values: Sequence[float | None], write: Write) -> str:
    return " \u2192 ".join("not measured" if value is None else write(value) for value in values)


def _took(entry: Entry) -> Cell:
    return _cell("seconds", entry, significant)


def _ceiling(round_: Ceiling) -> list[Cell]:
    """The figures of one round: the ceiling, what was predicted, what was measured, and its share of the ceiling."""

    def ratio(name: str, value: float | None) -> Cell:
        entry = {"not_measured": round_.about} if value is None else {"value": value, "unit": "1", "repeats": 1}
        return _cell(f"ceiling.{name}", entry, significant)

    return [ratio(name, getattr(round_, name)) for name in ("ceiling", "predicted", "measured", "share")]


def _measurable(run: Run) -> list[tuple[str, str, Entry]]:
    """Every entry of the page's tables, for the list of what is missing."""
    columns, rows = _steps(run)
    return [
        (label, column.name, cell.entry)
        for label, _, cells in rows
        for column, cell in zip(columns, cells, strict=True)
    ]


def _layer(layer: Layer) -> dict[str, Any]:
    """A row of the table of layers."""
    bits = [each for each in (layer.weight_bits, layer.activation_bits) if each is not None]
    return {
        "name": layer.name,
        "refused": layer.refused,
        "sparsity": layer.sparsity,
        "sparsity_json": json.dumps(layer.sparsity),
        "percent": None if layer.sparsity is None else f"{layer.sparsity * 100:.1f}",
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "quantized": bool(bits),
        "sqnr": None if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
        "sqnr_json": json.dumps(layer.sqnr_db),
        "kernel": layer.kernel,
        "integer": layer.integer,
        "notes": layer.notes,
    }


def _layer_words(found: Sequence[Layer]) -> str:
    counts = {
        "pruned": sum(layer.sparsity is not None for layer in found),
        "quantized": sum(layer.weight_bits is not None for layer in found),
        "refused by a step": sum(layer.refused for layer in found),
    }
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _trainings(run: Run) -> list[dict[str, Any]]:
    """Steps that trained: what they say of the whole model, and their history as a table."""
    found = []
    for index, (label, row) in enumerate(zip(labels(run["rows"]), run["rows"], strict=True)):
        if not row["history"]:
            continue
        keys = list(dict.fromkeys(key for entry in row["history"] for key in entry))
        found.append(
            {
                "id": index,
                "label": label,
                "notes": [record["reason"] for record in row["layers"] if not record["layer"] and record["reason"]],
                "plots": [plot["id"] for plot in charts.histories(run) if plot["row"] == index],
                "columns": [charts.history_column(run, key) for key in keys],
                "rows": [[_history_cell(run, key, entry.get(key)) for key in keys] for entry in row["history"]],
            }
        )
    return found


def _history_cell(run: Run, key: str, value: float | None) -> tuple[str, str, str]:
    """Field, exact JSON value and text."""
    return key, json.dumps(value), "" if value is None else charts.history_text(run, key, value)
