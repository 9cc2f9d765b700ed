"""Read a run from disk, and refuse what is not one: what the report shows must be what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torchslim.errors import ArtifactError

RUN_FORMAT = 1

Check = Callable[[Any], bool]


def load_run(path: str | Path) -> dict[str, Any]:
    """The run that stands in `path`: a `run.json`, or a folder that holds one.

    Raises:
        ArtifactError: the file is missing, damaged, no run of torchslim, or written by a newer one.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "run.json").is_file():
            raise ArtifactError(f"{path} holds no run.json; give a folder that `result.save` wrote, or the file itself")
        path = path / "run.json"
    try:
        run = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no file {path}; give a run.json, or a folder that holds one") from error
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror or error}; give a run.json that you may read"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON ({error}); it is damaged or no run.json: run again") from error
    _check_format(run, path)
    for place, expected, got in _faults(run):
        shown = "nothing" if got is _MISSING else _shortened(got)
        raise ArtifactError(f"{path} is damaged: {place} must be {expected}, got {shown}; run again")
    return dict(run)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_format(run: Any, path: Path) -> None:
    version = run.get("format") if isinstance(run, dict) else None
    if version is None:
        raise ArtifactError(f'{path} is no run of torchslim: it has no "format"; give the run.json of a run')
    if type(version) is not int or version < 1:
        raise ArtifactError(f'{path}: "format" must be a number from 1 to {RUN_FORMAT}, got {_shortened(version)}')
    if version > RUN_FORMAT:
        raise ArtifactError(
            f"{path} has format {version}, and this torchslim reads up to {RUN_FORMAT}; upgrade torchslim, "
            "or use the report.html that was saved beside it"
        )


_MISSING = object()


def _shortened(value: Any) -> str:
    text = json.dumps(value)
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


def _speedups(value: Any) -> bool:
    return (
        _entries(value)
        and {"over_baseline", "over_previous"} <= set(value)
        and all("not_measured" in each or _text(each.get("verdict")) for each in value.values())
    )


def _history(value: Any) -> bool:
    return isinstance(value, list) and all(_object(row) and all(map(_number, row.values())) for row in value)


def _layers(value: Any) -> bool:
    optional = ("sparsity", "weight_bits", "activation_bits", "sqnr_db")
    return isinstance(value, list) and all(
        _object(each)
        and all(_text(each.get(key)) for key in ("layer", "action", "reason"))
        and all(each.get(key) is None or _number(each[key]) for key in optional)
        for each in value
    )


def _machines(value: Any) -> bool:
    return _object(value) and all(
        _object(machine) and _object(machine.get("versions", {})) for machine in value.values()
    )


ENTRY = "a number with its unit and repeats, or the reason why it was not measured"
ENTRIES = f"an object whose values are each {ENTRY}"
TOP: Mapping[str, tuple[Check, str]] = {
    "torchslim": (_text, "a version"),
    "recipe": (_object, "an object"),
    "metric": (
        lambda it: _object(it) and _text(it.get("name")) and _text(it.get("unit")),
        "a name and a unit",
    ),
    "target": (lambda it: _object(it) and _text(it.get("runtime")), "an object with a runtime"),
    "selected_on": (_text, "a text"),
    "reported_on": (_text, "a text"),
    "batch": (lambda it: _text(it) or _number(it), "a number or a text"),
    "machines": (_machines, "an object of machines with their versions"),
    "rows": (
        lambda it: isinstance(it, list) and bool(it) and all(map(_object, it)),
        "a list of objects, not empty",
    ),
}
ROW: Mapping[str, tuple[Check, str]] = {
    "name": (_text, "a text"),
    "kind": (_text, "a text"),
    "metric": (_entries, ENTRIES),
    "parameters": (_entry, ENTRY),
    "nonzero": (_entry, ENTRY),
    "macs": (_entry, ENTRY),
    "size_bytes": (_entry, ENTRY),
    "seconds": (_entry, ENTRY),
    "latency_ms": (_entries, ENTRIES),
    "speedup": (_speedups, "over_baseline and over_previous, each a number with a verdict or not measured"),
    "shrink": (_entries, ENTRIES),
    "layers": (_layers, "a list of layer records"),
    "warnings": (_texts, "a list of texts"),
    "history": (_history, "a list of objects of numbers"),
}


def _faults(run: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Where the run departs from its schema: place, what it must be, what it is. Unknown keys are let be."""
    for key, (good, expected) in TOP.items():
        if not good(run.get(key, _MISSING)):
            yield key, expected, run.get(key, _MISSING)
            return
    runtime = run["target"]["runtime"]
    split = run["reported_on"].partition(" ")[0]
    for index, row in enumerate(run["rows"]):
        for key, (good, expected) in ROW.items():
            if not good(row.get(key, _MISSING)):
                yield f"rows[{index}].{key}", expected, row.get(key, _MISSING)
                return
        for parent, key in (("metric", split), ("latency_ms", runtime)):
            if key not in row[parent]:
                yield f"rows[{index}].{parent}.{key}", ENTRY, _MISSING
