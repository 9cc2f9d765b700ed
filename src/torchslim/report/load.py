"""Read a run from disk, and refuse what is not one: what the report shows must be what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchslim.core.schema import Limits, Schema, parse_json, read_file
from torchslim.errors import ArtifactError
from torchslim.report.records import Run

RUN_FORMAT = 1
LIMITS = Limits(size_bytes=64 * 2**20)  # hundreds of trials, thousands of layers
# C0 but for tabs and ends of lines, DEL, C1, and what changes the direction of the text
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
RUN: Schema[dict[str, Any]] = Schema(Run, "run.json", ArtifactError, limits=LIMITS, mend="run again")

Check = Callable[[Any], bool]


def load_run(path: str | Path) -> dict[str, Any]:
    """The run that stands in `path`: a `run.json`, or a folder that holds one.

    Raises:
        ArtifactError: the file is missing, damaged, no run of torchslim, or written by a newer one.
    """
    return _load(Path(path), "run")


def load_search(path: str | Path) -> dict[str, Any]:
    """The search that stands in `path`: a `search.json`, or a folder that holds one.

    Raises:
        ArtifactError: as for `load_run`.
    """
    return _load(Path(path), "search")


def load_sensitivity(path: str | Path) -> dict[str, Any]:
    """The analysis that stands in `path`: a `sensitivity.json`, or a folder that holds one.

    Raises:
        ArtifactError: as for `load_run`.
    """
    return _load(Path(path), "sensitivity")


def kind_of(path: str | Path) -> str:
    """What a folder or a file holds: "run", "search" or "sensitivity"; the first of them where there are several."""
    path = Path(path)
    if path.is_dir():
        return next((kind for kind in KINDS if (path / f"{kind}.json").is_file()), "run")
    try:
        raw = read_file(path, ArtifactError, size_bytes=LIMITS.size_bytes)
        data = parse_json(raw, str(path), ArtifactError, limits=LIMITS)
    except ArtifactError:  # what is wrong is said when it is loaded
        return "run"
    known = data.get("kind", "run") if isinstance(data, dict) else "run"
    return known if isinstance(known, str) and known in KINDS else "run"


def _load(path: Path, kind: str) -> dict[str, Any]:
    file, (whose, faults) = f"{kind}.json", KINDS[kind]
    if path.is_dir():
        if not (path / file).is_file():
            raise ArtifactError(f"{path} holds no {file}; give a folder that {whose} wrote, or the file itself")
        path = path / file
    if not path.exists():
        raise ArtifactError(f"there is no file {path}; give a {file}, or a folder that holds one")
    raw = read_file(path, ArtifactError, size_bytes=LIMITS.size_bytes, mend=f"give a {file} that you may read")
    data = parse_json(raw, str(path), ArtifactError, limits=LIMITS, mend="run again")
    _check_format(data, path, kind)
    if kind == "run":
        RUN.check(data, str(path))
    for place, expected, got in faults(data):
        shown = "nothing" if got is _MISSING else _shortened(got)
        raise ArtifactError(f"{path} is damaged: {place} must be {expected}, got {shown}; run again")
    return dict(_visible(data))


def _visible(value: Any) -> Any:
    """The value with control characters as escapes, in all of its texts: none may steer the terminal it is shown on."""
    if isinstance(value, str):
        return value if value.isprintable() else CONTROL.sub(lambda found: ascii(found[0])[1:-1], value)
    if isinstance(value, list):
        return [_visible(each) for each in value]
    if isinstance(value, dict):
        return {_visible(key): _visible(each) for key, each in value.items()}
    return value


def _check_format(data: Any, path: Path, kind: str) -> None:
    version = data.get("format") if isinstance(data, dict) else None
    if version is None:
        raise ArtifactError(f'{path} is no {kind} of torchslim: it has no "format"; give the {kind}.json of a {kind}')
    if data.get("kind", "run") != kind:
        raise ArtifactError(f"{path} is no {kind} but a {_shortened(data['kind'])}; give a {kind}.json")
    if type(version) is not int or version < 1:
        raise ArtifactError(f'{path}: "format" must be a number from 1 to {RUN_FORMAT}, got {_shortened(version)}')
    if version > RUN_FORMAT:
        raise ArtifactError(
            f"{path} has format {version}, and this torchslim reads up to {RUN_FORMAT}; upgrade torchslim, "
            "or use the report.html that was saved beside it"
        )


_MISSING = object()


def _shortened(value: Any) -> str:
    text = json.dumps(value)  # ASCII: nothing in it can steer a terminal
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _entry(value: Any) -> bool:
    """A number with its unit, or the reason why there is none."""
    if not isinstance(value, dict):
        return False
    if "not_measured" in value:
        return _text(value["not_measured"])
    spread = all(_number(value.get(key)) for key in ("low", "high")) or not {"low", "high"} & set(value)
    return _number(value.get("value")) and _text(value.get("unit")) and _number(value.get("repeats")) and spread


def _entries(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_entry, value.values()))


def _machines(value: Any) -> bool:
    return _object(value) and all(
        _object(machine) and _object(machine.get("versions", {})) for machine in value.values()
    )


ENTRY = "a number with its unit and repeats, or the reason why it was not measured"
ENTRIES = f"an object whose values are each {ENTRY}"


def _faults(run: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """What the types of a run cannot say: figures that belong together."""
    runtime = run["target"]["runtime"]
    split = run["reported_on"].partition(" ")[0]
    for index, row in enumerate(run["rows"]):
        for place, value in _figures(row):
            if not _entry(value):
                yield f"rows[{index}].{place}", f"{ENTRY}, with both low and high or neither", value
        for parent, key in (("metric", split), ("latency_ms", runtime)):
            if key not in row[parent]:
                yield f"rows[{index}].{parent}.{key}", ENTRY, _MISSING
        for number, cut in enumerate(row.get("evidence", {}).get("latency", [])):
            if cut["best"] > len(cut["rounds"]):
                yield f"rows[{index}].evidence.latency[{number}].best", "the number of a round", cut["best"]


def _figures(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A row's numbers, alone and in tables, with their places."""
    for name in ("parameters", "nonzero", "macs", "size_bytes", "seconds"):
        yield name, row[name]
    for parent in ("metric", "latency_ms", "speedup", "shrink"):
        for name, value in row[parent].items():
            yield f"{parent}.{name}", value


def _numbers(value: Any) -> bool:
    return _object(value) and all(map(_number, value.values()))


def _measured(value: Any) -> bool:
    return _object(value) and _entries(value.get("metric")) and _entries(value.get("figures"))


def _verdict(value: Any) -> bool:
    return (
        _object(value)
        and isinstance(value.get("met"), bool)
        and _text(value.get("text"))
        and _texts(value.get("binding"))
        and (value.get("nearest") is None or _number(value["nearest"]))
    )


def _range(value: Any) -> bool:
    if not (_object(value) and _text(value.get("name"))):
        return False
    if value.get("kind") == "choice":
        return isinstance(value.get("choices"), list)
    return value.get("kind") in ("float", "int") and _number(value.get("low")) and _number(value.get("high"))


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


MACHINES = (_machines, "an object of machines with their versions")
SEARCH: Mapping[str, tuple[Check, str]] = {
    "torchslim": (_text, "a version"),
    "recipe": (_object, "an object"),
    "space": (_list(_range), "a list of ranges and choices with their names"),
    "budget": (_object, "an object"),
    "objectives": (_texts, "a list of texts"),
    "metric": (lambda it: _object(it) and _text(it.get("name")) and _text(it.get("unit")), "a name and a unit"),
    "baseline": (_measured, "an object with the metric and the figures"),
    "trials": (_list(_object), "a list of objects"),
    "front": (_list(_object), "a list of objects"),
    "verdict": (_verdict, "met, text, nearest and binding"),
    "machines": MACHINES,
}
TRIAL: Mapping[str, tuple[Check, str]] = {
    "number": (_number, "a number"),
    "parameters": (_object, "an object"),
    "state": (_text, "a text"),
    "stage": (_text, "a text"),
    "reason": (_text, "a text"),
    "figures": (_numbers, "an object of numbers"),
    "within": (lambda it: isinstance(it, bool), "true or false"),
    "seconds": (_number, "a number"),
}
MEMBER: Mapping[str, tuple[Check, str]] = {
    "trial": (_number, "a number"),
    "parameters": (_object, "an object"),
    "recipe": (_text, "a text"),
    "metric": (_entries, ENTRIES),
    "figures": (_entries, ENTRIES),
    "within": (lambda it: isinstance(it, bool), "true or false"),
}
SENSITIVITY: Mapping[str, tuple[Check, str]] = {
    "torchslim": (_text, "a version"),
    "model": (_text, "a text"),
    "measure": (_text, "a text"),
    "unit": (_text, "a text"),
    "higher_is_better": (lambda it: isinstance(it, bool), "true or false"),
    "reference": (lambda it: it is None or _number(it), "a number or null"),
    "runtime": (_text, "a text"),
    "points": (_list(_object), "a list of objects"),
    "machines": MACHINES,
}
POINT: Mapping[str, tuple[Check, str]] = {
    "name": (_text, "a text"),
    "kind": (lambda it: it in ("channels", "layer"), "'channels' or 'layer'"),
    "change": (_text, "a text"),
    "value": (lambda it: it is None or _number(it), "a number or null"),
    "refused": (_text, "a text"),
}


def _lists(
    top: Mapping[str, tuple[Check, str]], rows: Mapping[str, Mapping[str, tuple[Check, str]]]
) -> Callable[[dict[str, Any]], Iterator[tuple[str, str, Any]]]:
    """Faults of an object whose lists hold objects."""

    def faults(data: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
        for key, (good, expected) in top.items():
            if not good(data.get(key, _MISSING)):
                yield key, expected, data.get(key, _MISSING)
                return
        for parent, checks in rows.items():
            for index, row in enumerate(data[parent]):
                for key, (good, expected) in checks.items():
                    if not good(row.get(key, _MISSING)):
                        yield f"{parent}[{index}].{key}", expected, row.get(key, _MISSING)

    return faults


KINDS: Mapping[str, tuple[str, Callable[[dict[str, Any]], Iterator[tuple[str, str, Any]]]]] = {
    "run": ("`result.save`", _faults),
    "search": ("`torchslim search`", _lists(SEARCH, {"trials": TRIAL, "front": MEMBER})),
    "sensitivity": ("`torchslim sensitivity`", _lists(SENSITIVITY, {"points": POINT})),
}
