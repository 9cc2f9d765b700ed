"""Render a run as one HTML page that needs nothing else: no network, no fonts, no other file.

The functions stand in the order of the page: tiles, table of steps, gains and ceilings, layers, trainings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

from torchslim.report import charts
from torchslim.report.cells import NOT_MEASURED, Cell, Column, Write, absent_cell, cell_of, latency_cell
from torchslim.report.findings import (
    Ceiling,
    Layer,
    batch_words,
    ceilings,
    choices_by_latency,
    elsewhere,
    gains,
    gaps,
    labels,
    latency_entry,
    layers,
    metric_change,
    metric_entry,
    part_latencies,
    provenance,
    reported_split,
    summary,
    time_words,
    warnings,
)
from torchslim.report.html import fill, machine_facts
from torchslim.report.numbers import (
    TIMES,
    TO,
    counted,
    faster,
    in_unit,
    is_measured,
    metric_text,
    ratio_text,
    significant,
    sized,
    smaller,
    value_of,
    with_unit,
)
from torchslim.report.records import Entry, Measured, NotMeasured, Row, Run

OPEN_LAYERS = 40  # a longer table of layers starts folded


class StepColumn(NamedTuple):
    """A column of the table of steps: its heading, and the function that makes the cell of a row."""

    heading: Column
    cell: Callable[[Row], Cell]


class StepRow(NamedTuple):
    """A row of the table of steps."""

    label: str
    row: Row
    cells: list[Cell]


class Tile(NamedTuple):
    """A headline figure, with a note on how it changed."""

    heading: str
    figure: str
    note: str


def render(run: dict[str, Any]) -> str:
    """Render a run as a self-contained HTML page.

    The page loads nothing: its Content-Security-Policy forbids all requests, and all scripts except its own.

    Args:
        run: content of `run.json`.
    """
    return _render(cast("Run", run))


def _render(run: Run) -> str:
    """The page of a run."""
    columns = _step_columns(run)
    rows = _step_rows(run, columns)
    changed_layers = layers(run)
    return fill(
        "page.html.j2",
        ("plot.js", "page.js"),
        run=run,
        split=reported_split(run),
        runtime=run["target"]["runtime"],
        # header
        model=run["recipe"].get("model"),
        path=[step.label for step in rows if step.row["kind"] == "step"] or ["baseline"],
        summary=summary(run),
        provenance=provenance(run),
        time=time_words(run),
        batch=batch_words(run),
        tiles=[_metric_tile(run), _size_tile(run), _latency_tile(run), _nonzero_tile(run)],
        warnings=warnings(run),
        # steps
        columns=[column.heading for column in columns],
        rows=rows,
        gaps=gaps(run, _step_entries(columns, rows)),
        part_latencies=part_latencies(run),
        gains=[(gain, cell_of("seconds", gain.seconds, significant)) for gain in gains(run)],
        choices=[*choices_by_latency(run), *elsewhere(run)],
        ceilings=[(ceiling, _ceiling_cells(ceiling)) for ceiling in ceilings(run)],
        # layers
        layers=[_layer_row(layer) for layer in changed_layers],
        layers_open=len(changed_layers) <= OPEN_LAYERS,
        layer_words=_layer_counts(changed_layers),
        # trainings
        data={"tradeoffs": charts.tradeoffs(run), "histories": charts.histories(run)},
        trainings=_trainings(run),
        # origin
        recipe=json.dumps(run["recipe"], indent=2, ensure_ascii=False),
        machines=machine_facts(run["machines"]),
    )


# tiles ----------------------------------------------------------------------------------------------------------------


def _metric_tile(run: Run) -> Tile:
    first, last = run["rows"][0], run["rows"][-1]
    unit = run["metric"]["unit"]

    def write(value: float) -> str:
        return with_unit(metric_text(value, unit), unit)

    before, after = value_of(metric_entry(run, first)), value_of(metric_entry(run, last))
    return Tile(
        heading=f"{run['metric']['name']} on {reported_split(run)}",
        figure=NOT_MEASURED if after is None else write(after),
        note=metric_change(run, first, last) + ("" if before is None else f", was {write(before)}"),
    )


def _size_tile(run: Run) -> Tile:
    before, after = (value_of(run["rows"][index]["size_bytes"]) for index in (0, -1))
    figure = NOT_MEASURED
    if before is not None and after is not None:
        figure = "same size" if before == after else _with_times_sign(smaller(before, after))
    return Tile(heading="size of what ships", figure=figure, note=_from_to(before, after, sized))


def _latency_tile(run: Run) -> Tile:
    speedup = run["rows"][-1]["speedup"]["over_baseline"]
    figure = NOT_MEASURED
    if is_measured(speedup):
        same = speedup["verdict"] == "no difference"
        figure = "no difference" if same else _with_times_sign(faster(speedup["value"]))
    before, after = (value_of(latency_entry(run, run["rows"][index])) for index in (0, -1))
    return Tile(
        heading=f"latency on {run['target']['runtime']}",
        figure=figure,
        note=_from_to(before, after, lambda milliseconds: f"{significant(milliseconds)} ms"),
    )


def _nonzero_tile(run: Run) -> Tile:
    before, after = (value_of(run["rows"][index]["nonzero"]) for index in (0, -1))
    return Tile(
        heading="weights that are not zero",
        figure=NOT_MEASURED if after is None else counted(after),
        note=_from_to(before, after, counted),
    )


def _with_times_sign(text: str) -> str:
    return text.replace(" times ", f"{TIMES} ")


def _from_to(before: float | None, after: float | None, write: Write) -> str:
    return " \u2192 ".join(NOT_MEASURED if value is None else write(value) for value in (before, after))


# table of steps -------------------------------------------------------------------------------------------------------


def _step_columns(run: Run) -> list[StepColumn]:
    """Columns of the table of steps; the main ones stand first, since a narrow window shows the rest on scrolling."""
    reported, runtime = reported_split(run), run["target"]["runtime"]
    others = [split for split in run["rows"][0]["metric"] if split != reported]
    eager = [] if runtime == "eager" else [_latency_column("Latency, eager", "eager")]
    return [
        _metric_column(run, reported),
        _size_column(run),
        StepColumn(
            Column(name="Smaller", unit=f"{TIMES}, over baseline"),
            lambda row: cell_of("shrink.over_baseline", row["shrink"]["over_baseline"], ratio_text),
        ),
        _latency_column(f"Latency on {runtime}", runtime),
        StepColumn(Column(name="Speed-up", unit=f"{TIMES}, over baseline"), _speedup_cell),
        *eager,
        *(_largest_columns(runtime) if "sizes" in run else []),
        _count_column("nonzero", "Non-zero"),
        _count_column("parameters", "Parameters"),
        _count_column("macs", "MACs", "per sample" if run["batch"] == 1 else "per call"),
        *(_metric_column(run, split) for split in others),
    ]


def _metric_column(run: Run, split: str) -> StepColumn:
    name, unit = run["metric"]["name"], run["metric"]["unit"]

    def cell(row: Row) -> Cell:
        entry = row["metric"].get(split, NotMeasured(not_measured=f"no figure on {split}"))
        return cell_of(f"metric.{split}", entry, lambda value: metric_text(value, unit))

    return StepColumn(Column(name=f"{name} on {split}", unit=unit), cell)


def _size_column(run: Run) -> StepColumn:
    unit, unit_bytes = charts.common_unit(run)
    return StepColumn(
        Column(name="Size", unit=unit),
        lambda row: cell_of("size_bytes", row["size_bytes"], lambda size: in_unit(size, unit_bytes)),
    )


def _latency_column(
    name: str, runtime: str, figure: Literal["latency_ms", "latency_largest_ms"] = "latency_ms"
) -> StepColumn:
    return StepColumn(
        Column(name=name, unit=f"ms, p10{TO}p90"),
        lambda row: latency_cell(
            f"{figure}.{runtime}", row[figure].get(runtime, NotMeasured(not_measured="no figure"))
        ),
    )


def _largest_columns(runtime: str) -> list[StepColumn]:
    """Columns of the largest inputs, where sizes vary."""
    return [
        _latency_column("Latency, largest size", runtime, "latency_largest_ms"),
        StepColumn(
            Column(name="Speed-up, largest size", unit=f"{TIMES}, over baseline"),
            lambda row: _speedup_cell(row, "speedup_largest"),
        ),
    ]


def _count_column(key: Literal["nonzero", "parameters", "macs"], name: str, unit: str = "") -> StepColumn:
    return StepColumn(Column(name=name, unit=unit), lambda row: cell_of(key, row[key], counted))


def _step_rows(run: Run, columns: Sequence[StepColumn]) -> list[StepRow]:
    return [
        StepRow(label, row, [column.cell(row) for column in columns])
        for label, row in zip(labels(run["rows"]), run["rows"], strict=True)
    ]


def _step_entries(columns: Sequence[StepColumn], rows: Sequence[StepRow]) -> list[tuple[str, str, Entry]]:
    """Label, column name and entry of every cell, for the list of missing figures."""
    return [
        (step.label, column.heading.name, cell.entry)
        for step in rows
        for column, cell in zip(columns, step.cells, strict=True)
    ]


def _speedup_cell(row: Row, figure: Literal["speedup", "speedup_largest"] = "speedup") -> Cell:
    """The speed-up over the baseline; "no difference" if it is within the spread, whatever the median is."""
    field, entry = f"{figure}.over_baseline", row[figure]["over_baseline"]
    if not is_measured(entry):
        return absent_cell(field, entry)
    text = ratio_text(entry["value"])
    if row["kind"] == "baseline":
        return Cell(field=field, entry=entry, text=text)
    interval = f"{ratio_text(entry['low'])}{TO}{ratio_text(entry['high'])}" if "low" in entry else ""
    if entry["verdict"] == "no difference":
        return Cell(field=field, entry=entry, text="no difference", note=f"{text}, {interval}", tone="none")
    tone = "good" if entry["value"] > 1 else "bad"
    return Cell(field=field, entry=entry, text=f"{text} {entry['verdict']}", note=interval, tone=tone)


# ceilings -------------------------------------------------------------------------------------------------------------


def _ceiling_cells(round_: Ceiling) -> list[Cell]:
    """The cells of one round: the ceiling, the predicted and the measured time, and the measured over the ceiling."""
    cells = []
    for name in ("ceiling", "predicted", "measured", "share"):
        value = getattr(round_, name)
        if value is None:
            cells.append(absent_cell(f"ceiling.{name}", NotMeasured(not_measured=round_.about)))
        else:
            cells.append(cell_of(f"ceiling.{name}", Measured(value=value, unit="1", repeats=1), significant))
    return cells


# layers ---------------------------------------------------------------------------------------------------------------


def _layer_row(layer: Layer) -> dict[str, Any]:
    """A row of the table of layers."""
    return {
        "name": layer.name,
        "refused": layer.refused,
        "sparsity": layer.sparsity,
        "sparsity_json": json.dumps(layer.sparsity),
        "percent": None if layer.sparsity is None else f"{layer.sparsity * 100:.1f}",
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "quantized": layer.weight_bits is not None or layer.activation_bits is not None,
        "sqnr": None if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
        "sqnr_json": json.dumps(layer.sqnr_db),
        "kernel": layer.kernel,
        "integer": layer.integer,
        "notes": layer.notes,
    }


def _layer_counts(changed_layers: Sequence[Layer]) -> str:
    """Numbers of pruned, quantized and refused layers, in words."""
    counts = {
        "pruned": sum(layer.sparsity is not None for layer in changed_layers),
        "quantized": sum(layer.weight_bits is not None for layer in changed_layers),
        "refused by a step": sum(layer.refused for layer in changed_layers),
    }
    return ", ".join(f"{count} {word}" for word, count in counts.items())


# trainings ------------------------------------------------------------------------------------------------------------


def _trainings(run: Run) -> list[dict[str, Any]]:
    """Steps that trained: their notes on the whole model, the ids of their plots, and their history as a table."""
    plots = charts.histories(run)
    return [
        {
            "id": index,
            "label": label,
            "notes": [record["reason"] for record in row["layers"] if not record["layer"] and record["reason"]],
            "plots": [plot["id"] for plot in plots if plot["row"] == index],
            **_history_table(run, row["history"]),
        }
        for index, (label, row) in enumerate(zip(labels(run["rows"]), run["rows"], strict=True))
        if row["history"]
    ]


def _history_table(run: Run, history: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Headings and rows of the figures by epoch; a figure that an epoch lacks is left empty."""
    keys = list(dict.fromkeys(key for epoch in history for key in epoch))
    return {
        "columns": [charts.history_column(run, key) for key in keys],
        "rows": [[_history_cell(run, key, epoch.get(key)) for key in keys] for epoch in history],
    }


def _history_cell(run: Run, key: str, value: float | None) -> tuple[str, str, str]:
    """Field, exact JSON value and text."""
    return key, json.dumps(value), "" if value is None else charts.history_text(run, key, value)
