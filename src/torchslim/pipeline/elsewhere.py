"""Add times from another machine to the record and the report of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchslim.artifact.bench_pack import program_id
from torchslim.artifact.manifest import manifest_digest
from torchslim.artifact.opened import Opened, open_artifact
from torchslim.artifact.signing import Key, sign
from torchslim.artifact.times import Times
from torchslim.artifact.writing import MANIFEST, replace_files
from torchslim.core.files import json_bytes, write_bytes
from torchslim.core.folder_lock import reading
from torchslim.core.measurement import THIS_MACHINE
from torchslim.errors import ArtifactError, TorchslimError
from torchslim.pipeline.run_record import not_measured
from torchslim.report import load_run, render
from torchslim.runtimes import find_runtime

RUN, REPORT = "run.json", "report.html"


def add_times(folder: str | Path, times: Times, *, key: Key | None = None) -> dict[str, Any]:
    """Add times to run.json and report.html in a folder that `Result.save` or `torchslim run` wrote; return the record.

    A program belongs to a row if its files have the same bytes: those of the folder's artifact to the last row, those
    of a stage in the folder `work` to the row of the stage. Times of the same machine are replaced.

    Args:
        folder: of the run.
        times: from the machine.
        key: private key for a signed artifact, which is signed again: its record is one of the signed files.

    Raises:
        ArtifactError: no run, a signed artifact without a key, or no program of the run among those timed.
    """
    folder = Path(folder)
    run = load_run(folder)
    opened = _artifact(folder)
    if opened is not None and "signature" in opened.manifest and key is None:
        raise ArtifactError(f"{folder} is signed, its record too; give the private key to sign it again: --key")
    merged = with_times(run, times, _rows(folder, len(run["rows"]), opened))
    updates = {RUN: json_bytes(merged), REPORT: render(merged).encode()}
    if opened is None:
        for name, data in updates.items():
            write_bytes(folder / name, data)
        return merged
    files = {name: opened.read(name) for name in opened.manifest["files"]} | updates
    manifest = {name: value for name, value in opened.manifest.items() if name != "signature"}
    manifest["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    manifest["digest"] = manifest_digest(manifest)
    if key is not None:
        manifest["signature"] = sign(manifest["digest"], key)
    replace_files(folder, files, manifest)
    return merged


def with_times(run: Mapping[str, Any], times: Times, rows: Mapping[int, str]) -> dict[str, Any]:
    """The record of a run with the times of the rows whose programs were timed.

    Args:
        run: content of run.json; not modified.
        times: from the machine.
        rows: identity of the program of each row that is known.

    Raises:
        ArtifactError: none of the programs is the run's.
    """
    merged: dict[str, Any] = json.loads(json.dumps(run))
    places: dict[str, str] = {}
    for number, program in enumerate(times.programs):
        places.setdefault(program["program"], str(number))
    known = {row: places[program] for row, program in rows.items() if program in places}
    if not known:
        raise ArtifactError(
            "no program of this run is among those timed; pack its artifacts, torchslim bench --pack DIR RUN, and time "
            "these"
        )
    machine = str(times.machine["processor"])
    machine = "this, elsewhere" if machine == THIS_MACHINE else machine
    merged["machines"][machine] = dict(times.machine)
    for row, place in known.items():
        about = times.programs[int(place)]
        latency = {**times.timings.latency(place).to_dict(), "machine": machine}
        if 0 in known:
            ratio = {**times.timings.speedup(place, known[0]).to_dict(), "machine": machine}
        else:
            ratio = not_measured("the baseline was not timed there; pack work/00-baseline, too")
        entry = {"latency_ms": latency, "over_baseline": ratio, "threads": about["threads"], "inputs": about["inputs"]}
        merged["rows"][row].setdefault("elsewhere", {})[machine] = entry
    return merged


def _artifact(folder: Path) -> Opened | None:
    """The checked artifact in a folder; None if it holds none."""
    if not (folder / MANIFEST).is_file():
        return None
    with reading(folder):
        return open_artifact(folder)


def _rows(folder: Path, count: int, opened: Opened | None) -> dict[int, str]:
    """Identity of the program of each row that has an artifact of a whole model."""
    found = {} if opened is None else {count - 1: _identity(opened)}
    for row in range(count - 1):
        for stage in sorted((folder / "work").glob(f"{row:02d}-*")):
            if stage.is_dir() and (stage / MANIFEST).is_file():
                try:
                    found[row] = _identity(open_artifact(stage))
                except TorchslimError:
                    continue  # a damaged stage of an interrupted run
    return {row: identity for row, identity in found.items() if identity}


def _identity(opened: Opened) -> str:
    """Identity of the program of an artifact; empty for parts of a model."""
    manifest = opened.manifest
    if "runtime" not in manifest:
        return ""
    suffixes = find_runtime(manifest["runtime"]).suffixes
    hashes = {suffix: manifest["files"].get(f"model{suffix}", "") for suffix in suffixes}
    return program_id(hashes) if all(hashes.values()) else ""
