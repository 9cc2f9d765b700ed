"""Show a search as a page or a table: verdict, front of artifacts, and all trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torchslim.core.budget import BOUNDS, UNITS
from torchslim.report.cells import Cell, Column, absent_cell
from torchslim.report.html import fill, machine_facts
from torchslim.report.numbers import TO, counted, is_measured, metric_text, significant, spread, value_of, with_unit
from torchslim.report.records import Entry, NotMeasured
from torchslim.report.run_table import ABSENT, aligned, plain

Search = dict[str, Any]
Member = dict[str, Any]

FIGURES: Mapping[str, str] = {
    "metric_drop": "drop",
    "latency": "latency",
    "size": "size",
    "peak_memory": "peak memory",
    "macs": "MACs",
    "params": "parameters",
}
COUNTS = ("macs", "params")  # without a unit: the names say what is counted
STATES: Mapping[str, str] = {"candidate": "tried", "stopped": "stopped early", "failed": "failed"}


def render_search(data: Search) -> str:
    """The search as a self-contained HTML page.

    Args:
        data: content of `search.json`.
    """
    metric = data["metric"]
    columns = [
        Column(name=f"{metric['name']} on val", unit=metric["unit"]),
        Column(name=f"{metric['name']} on test", unit=metric["unit"]),
        *(Column(name=_capital(FIGURES[name]), unit=_heading_unit(data, name)) for name in _figures(data)),
    ]
    return fill(
        "search.html.j2",
        ("plot.js", "search.js"),
        search=data,
        title=_title(data),
        model=data["recipe"].get("model"),
        verdict=data["verdict"],
        binding=_binding(data),
        counts=_counts(data),
        tiles=_tiles(data),
        columns=columns,
        rows=[
            (_named(data["baseline"]), "", [], _cells(data, data["baseline"]), ""),
            *(
                (
                    _named(point),
                    point["recipe"],
                    _values(point["parameters"]),
                    _cells(data, point),
                    "within" if point["within"] else "outside",
                )
                for point in data["front"]
            ),
        ],
        explained=[_explained(data, point) for point in data["front"] if "explained" in point],
        spent=[(what, significant(amount)) for what, amount in data.get("spent", {}).items()],
        bounds=[f"{_name(data, name)} at most {_text(data, name, bound)}" for name, bound in _bounds(data).items()],
        parameters=[parameter["name"] for parameter in data["space"]],
        figures=[(name, _capital(FIGURES[name]), _heading_unit(data, name)) for name in _trial_figures(data)],
        trials=[_trial(data, trial) for trial in data["trials"]],
        failed=data.get("failed", []),
        space=[(parameter["name"], _range(parameter)) for parameter in data["space"]],
        machines=machine_facts(data["machines"]),
        data=_plot(data),
    )


def search_table(data: Search) -> str:
    """The search as plain text: the verdict, and a row and the parameters of every member of the front.

    Args:
        data: content of `search.json`.
    """
    metric, shown = data["metric"], _figures(data)
    headers = [
        ("trial", ""),
        (plain(metric["name"]), with_unit("val,", metric["unit"]).removesuffix(",")),
        ("", with_unit("test,", metric["unit"]).removesuffix(",")),
        *((FIGURES[name], "median [p10-p90]" if name == "latency" else "") for name in shown),
        ("budget", ""),
        ("recipe", ""),
    ]
    rows = [[_named(data["baseline"]), *_row(data, data["baseline"]), "", ""]]
    rows += [
        [_named(point), *_row(data, point), "kept" if point["within"] else "broken", plain(point["recipe"])]
        for point in data["front"]
    ]
    lines = [plain(data["verdict"]["text"]), "", *aligned(headers, rows), ""]
    lines += [f"{_named(point)}: {plain(', '.join(_values(point['parameters'])))}" for point in data["front"]]
    missing = dict.fromkeys(
        f"not measured ({ABSENT}): {plain(what)} of {_named(row)}: {plain(entry['not_measured'])}"
        for row in (data["baseline"], *data["front"])
        for what, entry in _entries(data, row)
        if not is_measured(entry)
    )
    failed = [f"failed in full: trial {trial['trial']}: {plain(trial['reason'])}" for trial in data.get("failed", [])]
    return "\n".join([*lines, *missing, *failed, _counts(data)])


def _explained(data: Search, point: Member) -> dict[str, Any]:
    """A member's explanation: predicted beside measured figures, and what was bought and refused."""
    found = point["explained"]
    pairs = []
    for name, value in found["predicted"].items():
        entry = point["figures"].get(name, NotMeasured(not_measured=""))
        if is_measured(entry):
            pairs.append((_capital(_name(data, name)), _text(data, name, value), _text(data, name, entry["value"])))
    return {"name": _named(point), "pairs": pairs, "bought": found["bought"], "refused": found["refused"]}


def explanation_text(data: Search) -> str:
    """Text with the explanation of every member of the front.

    Args:
        data: content of `search.json`.
    """
    members = [_explained(data, point) for point in data["front"] if "explained" in point]
    if not members:
        return "the values were drawn by a sampler, which gives no reasons; a solved search does (method = 'solve')"
    lines: list[str] = []
    for member in members:
        pairs = "; ".join(f"{name}: predicted {before}, measured {after}" for name, before, after in member["pairs"])
        lines += ["", plain(f"{member['name']}: {pairs}" if pairs else member["name"])]
        for title, key in (("bought most for its damage", "bought"), ("refused", "refused")):
            lines += [f"  {title}:"] * bool(member[key])
            lines += [f"    {plain(line)}" for line in member[key]]
    lines += ["", *(f"spent on {plain(what)}: {significant(amount)}" for what, amount in data.get("spent", {}).items())]
    return "\n".join(lines).strip("\n")


def _title(data: Search) -> str:
    if not data["front"]:
        return "Nothing was measured"
    if not _bounds(data):
        count = len(data["front"])
        return f"{count} recipe{'' if count == 1 else 's'} that no other beats"
    return "The budget is met" if data["verdict"]["met"] else "The budget is not met"


def _counts(data: Search) -> str:
    states = [trial["state"] for trial in data["trials"]]
    parts = [f"{states.count(state)} {word}" for state, word in STATES.items() if state in states]
    count = len(data["front"])
    return f"{len(states)} trials: {', '.join(parts) or 'none'}; {count} on the front, trained fully and measured"


def _bounds(data: Search) -> dict[str, float]:
    return {figure: data["budget"][key] for key, figure in BOUNDS.items() if key in data["budget"]}


def _figures(data: Search) -> list[str]:
    """Names of the artifacts' figures: objectives and bounds first."""
    present = {name for point in (data["baseline"], *data["front"]) for name in point["figures"]}
    first = dict.fromkeys((*data["objectives"], *_bounds(data)))
    return [name for name in (*first, *(name for name in FIGURES if name not in first)) if name in present]


def _trial_figures(data: Search) -> list[str]:
    present = {name for trial in data["trials"] for name in trial["figures"]}
    return [name for name in FIGURES if name in present]


def _unit(data: Search, name: str) -> str:
    if name == "metric_drop":
        return str(data["metric"]["unit"])
    return "" if name in COUNTS else UNITS[name]


def _heading_unit(data: Search, name: str) -> str:
    return f"ms, p10{TO}p90" if name == "latency" else _unit(data, name)


def _name(data: Search, name: str) -> str:
    return f"{data['metric']['name']} lost" if name == "metric_drop" else FIGURES[name]


def _write(data: Search, name: str, value: float) -> str:
    """A figure rounded for display, without its unit."""
    if name == "metric_drop":
        return metric_text(value, data["metric"]["unit"])
    return counted(value) if name in COUNTS else significant(value)


def _text(data: Search, name: str, value: float) -> str:
    return with_unit(_write(data, name, value), _unit(data, name))


def _entries(data: Search, row: Member) -> list[tuple[str, Entry]]:
    """Names and entries of a row that the tables show, in order."""
    metric = data["metric"]["name"]
    absent = NotMeasured(not_measured="the search stored no figure")
    return [
        *((f"{metric} on {split}", row["metric"].get(split, absent)) for split in ("val", "test")),
        *((FIGURES[name], row["figures"].get(name, absent)) for name in _figures(data)),
    ]


def _cells(data: Search, row: Member) -> list[Cell]:
    fields = ["metric.val", "metric.test", *_figures(data)]
    cells = []
    for field, (_, entry) in zip(fields, _entries(data, row), strict=True):
        if not is_measured(entry):
            cells.append(absent_cell(field, entry))
            continue
        value = entry["value"]
        tone = "bad" if value > _bounds(data).get(field, float("inf")) else ""
        if field.startswith("metric."):
            cells.append(Cell(field=field, entry=entry, text=metric_text(value, data["metric"]["unit"])))
        elif "low" in entry:
            middle, low, high = spread(entry)
            cells.append(Cell(field=field, entry=entry, text=middle, note=f"{low}{TO}{high}", tone=tone))
        else:
            cells.append(Cell(field=field, entry=entry, text=_write(data, field, value), tone=tone))
    return cells


def _row(data: Search, row: Member) -> list[str]:
    fields = ["", "", *_figures(data)]
    texts = []
    for field, (_, entry) in zip(fields, _entries(data, row), strict=True):
        if not is_measured(entry):
            texts.append(ABSENT)
        elif not field:
            texts.append(metric_text(entry["value"], data["metric"]["unit"]))
        elif "low" in entry:
            middle, low, high = spread(entry)
            texts.append(f"{middle} [{low}-{high}] {_unit(data, field)}".rstrip())
        else:
            texts.append(_text(data, field, entry["value"]))
    return texts


def _named(member: Member) -> str:
    return f"trial {member['trial']}" if "trial" in member else "the original"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _values(parameters: Mapping[str, Any]) -> list[str]:
    """Parameters as text; a skipped step is named once, without its other parameters."""
    skipped = {name.partition(".")[0] for name, value in parameters.items() if name.endswith(".skip") and value}
    texts = [f"{name} skipped" for name in sorted(skipped)]
    return texts + [
        f"{name} = {_shown(value)}"
        for name, value in parameters.items()
        if name.partition(".")[0] not in skipped and not name.endswith(".skip")
    ]


def _range(parameter: Mapping[str, Any]) -> str:
    if parameter["kind"] == "choice":
        return ", ".join(_shown(choice) for choice in parameter["choices"])
    return f"{_shown(parameter['low'])} to {_shown(parameter['high'])}"


def _trial(data: Search, trial: dict[str, Any]) -> dict[str, Any]:
    figures = trial["figures"]
    return {
        "number": trial["number"],
        "state": STATES.get(trial["state"], trial["state"]),
        "stage": trial["stage"],
        "figures": [
            (name, json.dumps(figures.get(name)), _write(data, name, figures[name]) if name in figures else ABSENT)
            for name in _trial_figures(data)
        ],
        "within": trial["within"],
        "reason": trial["reason"],
        "seconds": significant(trial["seconds"]),
        "values": _values(trial["parameters"]),
    }


def _binding(data: Search) -> list[str]:
    """Bounds that the nearest trial breaks, with the values that it reached."""
    verdict, bounds = data["verdict"], _bounds(data)
    nearest = next((point for point in data["front"] if point["trial"] == verdict["nearest"]), None)
    lines = []
    for name in verdict["binding"]:
        value = value_of(nearest["figures"].get(name, {})) if nearest else None
        reached = "not measured" if value is None else _text(data, name, value)
        lines.append(f"{_name(data, name)}: {reached}, at most {_text(data, name, bounds[name])} was asked for")
    return lines


def _tiles(data: Search) -> list[tuple[str, str, str]]:
    """Summary of the best or nearest trial: heading, figure, and a note with the original's figure."""
    best = next((point for point in data["front"] if point["trial"] == data["verdict"]["nearest"]), None)
    if best is None:
        return []
    tiles = []
    for name in _figures(data)[:4]:
        value = value_of(best["figures"].get(name, {}))
        before = value_of(data["baseline"]["figures"].get(name, {}))
        note = f"of {_named(best)}" if before is None else f"of {_named(best)}; was {_text(data, name, before)}"
        if name == "metric_drop":
            metric = value_of(best["metric"].get("val", {}))
            note = f"of {_named(best)}" + ("" if metric is None else f", which has {_text(data, name, metric)} on val")
        tiles.append((_name(data, name), "not measured" if value is None else _text(data, name, value), note))
    return tiles


def _plot(data: Search) -> dict[str, Any]:
    """Data of the plot: axes to choose from, and points with their figures."""
    names = list(dict.fromkeys((*data["objectives"], *_figures(data))))
    front = [
        _point(data, _named(point), point["parameters"], _plain_figures(point), point["within"])
        | {
            "low": {name: entry["low"] for name, entry in point["figures"].items() if "low" in entry},
            "high": {name: entry["high"] for name, entry in point["figures"].items() if "high" in entry},
        }
        for point in data["front"]
    ]
    trials = [
        _point(data, f"trial {row['number']}, {row['stage']}", row["parameters"], row["figures"], row["within"])
        for row in data["trials"]
        if row["figures"]
    ]
    first, second = (*data["objectives"], *names, names[0] if names else "")[:2]
    return {
        "axes": [{"name": name, "title": _axis(data, name)} for name in names],
        "x": second if first == "metric_drop" else first,
        "y": first if first == "metric_drop" else second,
        "bounds": _bounds(data),
        "front": front,
        "trials": trials,
        "original": _point(data, _named(data["baseline"]), {}, _plain_figures(data["baseline"]), True),
    }


def _plain_figures(row: Member) -> dict[str, float]:
    return {name: entry["value"] for name, entry in row["figures"].items() if "value" in entry}


def _point(
    data: Search, label: str, parameters: Mapping[str, Any], figures: Mapping[str, float], within: bool
) -> dict[str, Any]:
    shown = {name: value for name, value in figures.items() if name in FIGURES}
    return {
        "label": label,
        "within": within,
        "figures": shown,
        "lines": [f"{_name(data, name)} {_text(data, name, value)}" for name, value in shown.items()]
        + _values(parameters),
    }


def _axis(data: Search, name: str) -> str:
    unit = _unit(data, name)
    return f"{_name(data, name)}, {unit}" if unit else _name(data, name)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
