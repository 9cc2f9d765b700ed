"""Load runs, searches and analyses from disk, and refuse damaged files: a report must show what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchslim.core.budget import BOUNDS
from torchslim.core.schema import Limits, Schema, parse_json, read_file
from torchslim.errors import ArtifactError
from torchslim.report.records import Run, SearchFile, SensitivityFile

RUN_FORMAT = 1
LIMITS = Limits(size_bytes=64 * 2**20)  # hundreds of trials, thousands of layers
# C0 except tab and newline, DEL, C1, and characters that change the text's direction
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def load_run(path: str | Path) -> dict[str, Any]:
    """Load the run at `path`: a `run.json`, or a folder that holds one.

    Raises:
        ArtifactError: the file is missing, damaged, no run of torchslim, or written by a newer version.
    """
    return _load(Path(path), "run")


def load_search(path: str | Path) -> dict[str, Any]:
    """Load the search at `path`: a `search.json`, or a folder that holds one.

    Raises:
        ArtifactError: as for `load_run`.
    """
    return _load(Path(path), "search")


def load_sensitivity(path: str | Path) -> dict[str, Any]:
    """Load the analysis at `path`: a `sensitivity.json`, or a folder that holds one.

    Raises:
        ArtifactError: as for `load_run`.
    """
    return _load(Path(path), "sensitivity")


def kind_of(path: str | Path) -> str:
    """Kind of a folder or file: "run", "search" or "sensitivity"; the first of them if a folder holds several."""
    path = Path(path)
    if path.is_dir():
        return next((kind for kind in KINDS if (path / f"{kind}.json").is_file()), "run")
    try:
        raw = read_file(path, ArtifactError, size_bytes=LIMITS.size_bytes)
        data = parse_json(raw, str(path), ArtifactError, limits=LIMITS)
    except ArtifactError:  # loading the file raises the error again, with its message
        return "run"
    kind = data.get("kind", "run") if isinstance(data, dict) else "run"
    return kind if isinstance(kind, str) and kind in KINDS else "run"


def _load(path: Path, kind: str) -> dict[str, Any]:
    file, (writer, schema) = f"{kind}.json", KINDS[kind]
    if path.is_dir():
        if not (path / file).is_file():
            raise ArtifactError(f"{path} holds no {file}; give a folder that {writer} wrote, or the file itself")
        path = path / file
    if not path.exists():
        raise ArtifactError(f"there is no file {path}; give a {file}, or a folder that holds one")
    raw = read_file(path, ArtifactError, size_bytes=LIMITS.size_bytes, mend=f"give a {file} that you may read")
    data = parse_json(raw, str(path), ArtifactError, limits=LIMITS, mend="run again")
    _check_format(data, path, kind)
    schema.check(data, str(path))
    return dict(_visible(data))


def _visible(value: Any) -> Any:
    """`value` with control characters in all of its texts escaped, so that they cannot control a terminal."""
    if isinstance(value, str):
        return value if value.isprintable() else CONTROL.sub(lambda match: ascii(match[0])[1:-1], value)
    if isinstance(value, list):
        return [_visible(item) for item in value]
    if isinstance(value, dict):
        return {_visible(key): _visible(entry) for key, entry in value.items()}
    return value


def _check_format(data: Any, path: Path, kind: str) -> None:
    version = data.get("format") if isinstance(data, dict) else None
    if version is None:
        raise ArtifactError(f'{path} is no {kind} of torchslim: it has no "format"; give the {kind}.json of a {kind}')
    if data.get("kind", "run") != kind:
        raise ArtifactError(f"{path} is no {kind} but a {_shortened(data.get('kind', 'run'))}; give a {kind}.json")
    if type(version) is not int or version < 1:
        raise ArtifactError(f'{path}: "format" must be a number from 1 to {RUN_FORMAT}, got {_shortened(version)}')
    if version > RUN_FORMAT:
        raise ArtifactError(
            f"{path} has format {version}, and this torchslim reads up to {RUN_FORMAT}; upgrade torchslim, "
            "or use the report.html that was saved beside it"
        )


def _shortened(value: Any) -> str:
    text = json.dumps(value)  # ASCII: cannot control a terminal
    return text if len(text) <= 60 else f"{text[:57]}..."


def _run_fault(run: dict[str, Any]) -> str | None:
    """What the types of a run cannot express: figures that must agree."""
    for index, row in enumerate(run["rows"]):
        for place, entry in _figures(row):
            if ("low" in entry) != ("high" in entry):
                return f"rows[{index}].{place} needs both low and high, or neither"
        tables = [("metric", run["reported_on"].partition(" ")[0]), ("latency_ms", run["target"]["runtime"])]
        if "sizes" in run:
            tables += [("latency_largest_ms", run["target"]["runtime"]), ("speedup_largest", "over_baseline")]
        for parent, key in tables:
            if key not in row.get(parent, {}):
                return f"rows[{index}].{parent} has no {key}"
        for number, cut in enumerate(row.get("evidence", {}).get("latency", [])):
            if cut["best"] > len(cut["rounds"]):
                return f"rows[{index}].evidence.latency[{number}].best is no number of a round, got {cut['best']}"
    return None


def _figures(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries of a row with their places, single ones and those in tables."""
    for name in ("parameters", "nonzero", "macs", "size_bytes", "seconds"):
        yield name, row[name]
    for parent in ("metric", "latency_ms", "speedup", "latency_largest_ms", "speedup_largest", "shrink"):
        for name, value in row.get(parent, {}).items():
            yield f"{parent}.{name}", value


def _search_fault(search: dict[str, Any]) -> str | None:
    """What the types of a search cannot express."""
    bounds = {figure for key, figure in BOUNDS.items() if key in search["budget"]}
    if unknown := set(search["verdict"]["binding"]) - bounds:
        return f"verdict.binding names {sorted(unknown)}, which budget does not bound"
    for place, row in (
        ("baseline", search["baseline"]),
        *((f"front[{i}]", row) for i, row in enumerate(search["front"])),
    ):
        for table in ("metric", "figures"):
            for name, entry in row[table].items():
                if ("low" in entry) != ("high" in entry):
                    return f"{place}.{table}.{name} needs both low and high, or neither"
    return None


def _checked_by(kind: Any, file: str, fault: Callable[[Any], str | None]) -> Schema[Any]:
    return Schema(kind, file, ArtifactError, limits=LIMITS, mend="run again", also=fault)


KINDS: Mapping[str, tuple[str, Schema[Any]]] = {
    "run": ("`result.save`", _checked_by(Run, "run.json", _run_fault)),
    "search": ("`torchslim search`", _checked_by(SearchFile, "search.json", _search_fault)),
    "sensitivity": ("`torchslim sensitivity`", _checked_by(SensitivityFile, "sensitivity.json", lambda data: None)),
}
