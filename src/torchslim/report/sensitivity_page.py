"""Show a sensitivity analysis as a heat map or a table: a row for each layer, a column for each change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torchslim.report.html import fill, machine_facts
from torchslim.report.numbers import exact, metric_text, significant, with_unit
from torchslim.report.run_table import ABSENT, aligned, plain

Sensitivity = dict[str, Any]
Point = dict[str, Any]

MEASURES: Mapping[str, str] = {
    "sqnr": "signal over the noise that a change makes in the outputs",
    "kl": "KL divergence of the outputs from the unchanged model's",
    "metric": "the metric on val",
}
HARMLESS_DB = 45.0  # above this, differences are invisible; at 0 dB there is as much noise as signal
REFUSED = "refused"


def render_sensitivity(data: Sensitivity) -> str:
    """The analysis as a self-contained HTML page.

    Args:
        data: content of `sensitivity.json`.
    """
    rows, changes = _rows(data), _changes(data)
    largest = max((_damage(data, point) for point in data["points"]), default=0.0)
    return fill(
        "sensitivity.html.j2",
        data=data,
        title="Sensitivity of each layer",
        about=_about(data),
        columns=[
            (change, "channels removed" if change in _of(data, "channels") else "layer in it") for change in changes
        ],
        rows=[(name, [_cell(data, cells.get(change), largest) for change in changes]) for name, cells in rows],
        ends=_ends(data, largest),
        tiles=_tiles(data),
        refused=_refused(data),
        notes=data.get("notes", []),
        machines=machine_facts(data["machines"]),
    )


def sensitivity_table(data: Sensitivity) -> str:
    """The analysis as plain text.

    Args:
        data: content of `sensitivity.json`.
    """
    changes = _changes(data)
    headers = [("layer", ""), *((plain(change), _unit(data)) for change in changes)]
    rows = [[plain(name), *(_text(data, cells.get(change)) for change in changes)] for name, cells in _rows(data)]
    refused = [f"refused: {plain(name)}: {plain(reason)}" for name, reason in _refused(data)]
    notes = [plain(note) for note in data.get("notes", [])]
    lines = [f"{plain(data['model'])}: {_about(data)}", "", *aligned(headers, rows)]
    return "\n".join([*lines, *([""] if refused or notes else []), *refused, *notes])


def _about(data: Sensitivity) -> str:
    better = "higher" if data["higher_is_better"] else "lower"
    text = f"{MEASURES.get(data['measure'], data['measure'])} when one layer alone is changed, for {data['runtime']}"
    text += f" ({better} is better"
    if data["reference"] is not None:
        text += f"; unchanged: {with_unit(_write(data, data['reference']), _unit(data))}"
    return f"{text})"


def _unit(data: Sensitivity) -> str:
    return "" if data["unit"] == "1" else str(data["unit"])


def _changes(data: Sensitivity) -> list[str]:
    """All changes, those of channels first, in the order in which they were measured."""
    return list(dict.fromkeys((*_of(data, "channels"), *_of(data, "layer"))))


def _of(data: Sensitivity, kind: str) -> list[str]:
    return list(dict.fromkeys(point["change"] for point in data["points"] if point["kind"] == kind))


def _rows(data: Sensitivity) -> list[tuple[str, dict[str, Point]]]:
    """Layers in model order with their points, merged with their own channel group; other groups follow it."""
    layers: dict[str, dict[str, Point]] = {}
    for point in data["points"]:
        if point["kind"] == "layer":
            layers.setdefault(point["name"], {})[point["change"]] = point
    groups: dict[str, dict[str, Point]] = {}
    for point in data["points"]:
        if point["kind"] == "channels":
            groups.setdefault(point["name"], {})[point["change"]] = point
    order, merged, place = list(layers), set(), 0
    for name, cells in groups.items():
        layer = name.partition("[")[0].removesuffix(".weight")
        if layer in layers and layer not in merged:
            merged.add(layer)
            layers[layer] |= cells
            place = order.index(layer) + 1
        else:
            layers[name] = cells
            order.insert(place, name)
            place += 1
    return [(name, layers[name]) for name in order]


def _damage(data: Sensitivity, point: Point | None) -> float:
    """Damage of a point, at least 0; 0 if there is no value."""
    if point is None or point["value"] is None:
        return 0.0
    if data["measure"] == "sqnr":
        return max(HARMLESS_DB - float(point["value"]), 0.0)
    lost = point["value"] - (data["reference"] or 0.0)
    return float(max(-lost if data["higher_is_better"] else lost, 0.0))


def _heat(data: Sensitivity, point: Point, largest: float) -> float:
    """Color intensity of a point, from 0 (harmless) to 1."""
    scale = HARMLESS_DB if data["measure"] == "sqnr" else largest
    share = min(_damage(data, point) / scale, 1.0) if scale else 0.0
    return float(share if data["measure"] == "sqnr" else share**0.5)  # the root keeps small values visible


def _cell(data: Sensitivity, point: Point | None, largest: float) -> dict[str, str]:
    if point is None:
        return {"text": "", "value": "null", "tone": "none", "heat": "0", "title": "not measured"}
    place = f"{point['name']}, {point['change']}"
    if point["value"] is None:
        title = f"{place}: {point['refused'] or 'not measured'}"
        return {"text": ABSENT, "value": "null", "tone": REFUSED, "heat": "0", "title": title}
    return {
        "text": _text(data, point),
        "value": json.dumps(point["value"]),
        "tone": "heat",
        "heat": f"{100 * _heat(data, point, largest):.0f}",
        "title": f"{place}: {with_unit(exact(point['value']), _unit(data))}",
    }


def _text(data: Sensitivity, point: Point | None) -> str:
    if point is None:
        return ""
    return ABSENT if point["value"] is None else _write(data, point["value"])


def _write(data: Sensitivity, value: float) -> str:
    """`value` rounded for display, without its unit."""
    return metric_text(value, _unit(data)) if data["measure"] == "metric" else significant(value, 3)


def _ends(data: Sensitivity, largest: float) -> tuple[str, str]:
    """Meanings of the palest and the deepest color."""
    if data["measure"] == "sqnr":
        return f"{HARMLESS_DB:.0f} dB and more", "0 dB and less"
    return "nothing lost", f"{with_unit(significant(largest), _unit(data))} lost" if largest else "nothing lost"


def _refused(data: Sensitivity) -> list[tuple[str, str]]:
    """Distinct pairs of name and reason for points without a value."""
    pairs = [(point["name"], point["refused"] or "not measured") for point in data["points"] if point["value"] is None]
    return list(dict.fromkeys(pairs))


def _tiles(data: Sensitivity) -> list[tuple[str, str, str]]:
    measured = [point for point in data["points"] if point["value"] is not None]
    tiles = [("points measured", str(len(measured)), f"{len(data['points']) - len(measured)} refused")]
    for kind, heading in (("channels", "channels that hurt most"), ("layer", "layer that hurts most")):
        harmful = [point for point in measured if point["kind"] == kind and _damage(data, point) > 0]
        if harmful:
            worst = max(harmful, key=lambda point: _damage(data, point))
            text = with_unit(_write(data, worst["value"]), _unit(data))
            tiles.append((heading, worst["name"], f"{worst['change']}: {text}"))
    return tiles
