"""A sensitivity analysis as a heat map and as a table: a row for each layer, a column for each change."""

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
HARMLESS_DB = 45.0  # from here up nobody sees a difference; 0 dB is as much noise as signal
REFUSED = "refused"


def render_sensitivity(data: Sensitivity) -> str:
    """The analysis as a self-contained HTML page.

    Args:
        data: what `sensitivity.json` holds.
    """
    rows, changes = _rows(data), _changes(data)
    largest = max((_damage(data, point) for point in data["points"]), default=0.0)
    return fill(
        "sensitivity.html.j2",
        data=data,
        title="What each layer can take",
        about=_about(data),
        columns=[(each, "channels removed" if each in _of(data, "channels") else "layer in it") for each in changes],
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
        data: what `sensitivity.json` holds.
    """
    changes = _changes(data)
    headers = [("layer", ""), *((plain(change), _unit(data)) for change in changes)]
    rows = [[plain(name), *(_text(data, cells.get(change)) for change in changes)] for name, cells in _rows(data)]
    refused = [f"refused: {plain(name)}: {plain(reason)}" for name, reason in _refused(data)]
    notes = [plain(each) for each in data.get("notes", [])]
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
    """Of channels first, each kind in the order in which it was measured."""
    return list(dict.fromkeys((*_of(data, "channels"), *_of(data, "layer"))))


def _of(data: Sensitivity, kind: str) -> list[str]:
    return list(dict.fromkeys(point["change"] for point in data["points"] if point["kind"] == kind))


def _rows(data: Sensitivity) -> list[tuple[str, dict[str, Point]]]:
    """Layers in model order, each with the group of its own channels; other groups follow the group before them."""
    found: dict[str, dict[str, Point]] = {}
    for point in data["points"]:
        if point["kind"] == "layer":
            found.setdefault(point["name"], {})[point["change"]] = point
    groups: dict[str, dict[str, Point]] = {}
    for point in data["points"]:
        if point["kind"] == "channels":
            groups.setdefault(point["name"], {})[point["change"]] = point
    order, taken, place = list(found), set(), 0
    for name, cells in groups.items():
        layer = name.partition("[")[0].removesuffix(".weight")
        if layer in found and layer not in taken:
            taken.add(layer)
            found[layer] |= cells
            place = order.index(layer) + 1
        else:
            found[name] = cells
            order.insert(place, name)
            place += 1
    return [(name, found[name]) for name in order]


def _damage(data: Sensitivity, point: Point | None) -> float:
    """How bad a point is, from 0; 0 where it was refused."""
    if point is None or point["value"] is None:
        return 0.0
    if data["measure"] == "sqnr":
        return max(HARMLESS_DB - float(point["value"]), 0.0)
    lost = point["value"] - (data["reference"] or 0.0)
    return float(max(-lost if data["higher_is_better"] else lost, 0.0))


def _heat(data: Sensitivity, point: Point, largest: float) -> float:
    """From 0, harmless, to 1."""
    scale = HARMLESS_DB if data["measure"] == "sqnr" else largest
    share = min(_damage(data, point) / scale, 1.0) if scale else 0.0
    return float(share if data["measure"] == "sqnr" else share**0.5)  # a few large ones must not hide the rest


def _cell(data: Sensitivity, point: Point | None, largest: float) -> dict[str, str]:
    if point is None:
        return {"text": "", "value": "null", "tone": "none", "heat": "0", "title": "not looked at"}
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
    """A figure for the eye, without its unit."""
    return metric_text(value, _unit(data)) if data["measure"] == "metric" else significant(value, 3)


def _ends(data: Sensitivity, largest: float) -> tuple[str, str]:
    """What the palest and the deepest color stand for."""
    if data["measure"] == "sqnr":
        return f"{HARMLESS_DB:.0f} dB and more", "0 dB and less"
    return "nothing lost", f"{with_unit(significant(largest), _unit(data))} lost" if largest else "nothing lost"


def _refused(data: Sensitivity) -> list[tuple[str, str]]:
    """Each reason once for a name."""
    pairs = [(point["name"], point["refused"] or "not measured") for point in data["points"] if point["value"] is None]
    return list(dict.fromkeys(pairs))


def _tiles(data: Sensitivity) -> list[tuple[str, str, str]]:
    measured = [point for point in data["points"] if point["value"] is not None]
    tiles = [("points measured", str(len(measured)), f"{len(data['points']) - len(measured)} refused")]
    for kind, heading in (("channels", "channels that hurt most"), ("layer", "layer that hurts most")):
        own = [each for each in measured if each["kind"] == kind and _damage(data, each) > 0]
        if own:
            worst = max(own, key=lambda each: _damage(data, each))
            text = with_unit(_write(data, worst["value"]), _unit(data))
            tiles.append((heading, worst["name"], f"{worst['change']}: {text}"))
    return tiles
