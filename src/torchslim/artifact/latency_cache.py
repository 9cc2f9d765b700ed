"""Cache of latencies on one machine, runtime and number of threads, by the structure of the program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from typing_extensions import TypedDict

from torchslim.artifact.assembled import AnyDeployed
from torchslim.artifact.latency import compare
from torchslim.artifact.remote import TimingWorker
from torchslim.core.files import digest, present, write_json
from torchslim.core.folder_lock import holding
from torchslim.core.hardware import cache_folder, describe_machine
from torchslim.core.isolation import warn
from torchslim.core.measurement import Measurement
from torchslim.core.schema import Schema
from torchslim.errors import ArtifactError
from torchslim.report.records import strict

FORMAT = "torchslim-latency"
ROUNDS = 40
SECONDS = 20.0  # for all programs of one comparison
BUSY = 0.9  # of a reference's cached time: a time below this shows that the machine was busy before


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Ratio of a program's time to that of a reference, from paired rounds, and the program's milliseconds."""

    ratio: Measurement
    latency: Measurement

    def to_entry(self) -> dict[str, Any]:
        """The timing as an entry of the file."""
        ratio, low, high = self.ratio.value, self.ratio.p10, self.ratio.p90
        assert low is not None, "a ratio from paired rounds has a spread"
        assert high is not None
        return {"ratio": ratio, "low": low, "high": high, "ms": self.latency.value, "rounds": self.latency.rounds}

    def as_kept(self) -> Timing:
        """The timing as the file returns it: without the spread of the milliseconds, which the file does not store."""
        return Timing.from_entry(self.to_entry())

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Timing:
        """The timing of an entry of the file."""
        ratio = Measurement(value=entry["ratio"], unit="x", p10=entry["low"], p90=entry["high"], rounds=entry["rounds"])
        return cls(ratio=ratio, latency=Measurement(value=entry["ms"], unit="ms", rounds=entry["rounds"]))


@strict
class _Entry(TypedDict):
    ratio: Annotated[float, Gt(0), Le(1e12)]
    low: Annotated[float, Gt(0), Le(1e12)]
    high: Annotated[float, Gt(0), Le(1e12)]
    ms: Annotated[float, Gt(0), Le(1e12)]
    rounds: Annotated[int, Ge(1), Le(10**12)]


@strict
class _Table(TypedDict):
    """Content of the file; `entries` are by the reference's structure, then by the program's."""

    format: Literal["torchslim-latency"]
    about: dict[str, Any]
    entries: dict[str, dict[str, _Entry]]


TABLE: Schema[_Table] = Schema(_Table, "a table of latencies", ArtifactError, mend="delete it, or name another")


class LatencyTable:
    """Timings of programs on a machine: by the reference's structure, then by the program's.

    Args:
        runtime: runtime of the programs.
        threads: number of threads of the deployment; None leaves it to the runtime.
        path: the file; by default one in `cache_folder()` for this machine, runtime and number of threads.
        batch: samples a call.
        worker: times the programs, in place of this machine.
    """

    def __init__(
        self,
        runtime: str,
        threads: int | None = None,
        *,
        path: str | Path | None = None,
        batch: int | None = None,
        worker: TimingWorker | None = None,
    ) -> None:
        self.runtime, self.threads, self.batch = runtime, threads, batch
        self.compare = compare if worker is None else worker.compare
        if worker is None:
            machine = describe_machine(threads)
            about = {key: machine[key] for key in ("processor", "instruction_set", "cores", "versions")}
        else:
            about = {"worker": worker.machine()}
        self.about: dict[str, Any] = {"runtime": runtime, "threads": threads, "batch": batch, **about}
        self.given = path is not None  # a file that the user has named is not replaced if it holds something else
        self.path = Path(path) if path else cache_folder() / "latency" / f"{runtime}-{digest(self.about)[:16]}.json"

    def known(self, reference: str) -> dict[str, Timing]:
        """Timings relative to a reference, by structure.

        Raises:
            ArtifactError: the file named as `path` is damaged, or no table of this machine and runtime. A file in
                `cache_folder()` counts as empty instead, with a warning.
        """
        return {key: Timing.from_entry(entry) for key, entry in self._read().get(reference, {}).items()}

    def measure(
        self,
        deployed: Mapping[str, AnyDeployed],
        reference: AnyDeployed,
        *,
        again: bool = False,
        rounds: int = ROUNDS,
        seconds: float = SECONDS,
    ) -> dict[str, Timing]:
        """Timings of deployed models relative to the reference; those in the file are used, unless `again`."""
        first = reference.structure
        by_structure = {} if again else self.known(first)
        structures = {name: model.structure for name, model in deployed.items()}
        missing = {key: deployed[name] for name, key in structures.items() if key not in by_structure and key != first}
        if first not in by_structure or missing:
            timings = self.compare({first: reference} | missing, batch=self.batch, rounds=rounds, seconds=seconds)
            new = [*missing] if first in by_structure else [first, *missing]  # a reference keeps its first figure
            for key in new:
                by_structure[key] = Timing(ratio=timings.speedup(first, key), latency=timings.latency(key)).as_kept()
            self.add(first, {key: by_structure[key] for key in new})
        return {name: by_structure[key] for name, key in structures.items()}

    def settle(self, reference: AnyDeployed) -> Timing:
        """The reference's own timing, measured once more and replaced if it is markedly lower: the machine was busy.

        A busy machine changes milliseconds, but not ratios from paired rounds. A difference within the noise changes
        nothing, so that a repeated search gets the same figures.
        """
        first = reference.structure
        before = self.measure({"it": reference}, reference)["it"]
        measured = self.compare({first: reference}, batch=self.batch, rounds=ROUNDS, seconds=SECONDS).latency(first)
        if measured.value >= BUSY * before.latency.value:
            return before
        latency = Measurement(value=measured.value, unit="ms", rounds=measured.rounds)
        timing = Timing(ratio=replace(before.ratio, rounds=measured.rounds), latency=latency)
        self.add(first, {first: timing})
        return timing

    def add(self, reference: str, timings: Mapping[str, Timing]) -> None:
        """Add timings to the file; those that other processes added meanwhile stay."""
        with holding(self.path.with_name(f".{self.path.name}.lock"), lambda who: None):  # held for a moment only
            entries = self._read()
            entries.setdefault(reference, {}).update({key: timing.to_entry() for key, timing in timings.items()})
            write_json(self.path, {"format": FORMAT, "about": self.about, "entries": entries})

    def _read(self) -> dict[str, dict[str, Any]]:
        if not present(self.path):
            return {}
        try:
            table = TABLE.read(self.path)
            if table["about"] != json.loads(json.dumps(self.about)):
                raise ArtifactError(f"{self.path} is of another machine or runtime; delete it, or name another")
        except ArtifactError as error:
            if self.given:
                raise
            warn(f"{error}; it is measured again")
            return {}
        entries: dict[str, dict[str, Any]] = table["entries"]
        return entries
