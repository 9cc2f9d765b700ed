"""Times of programs on one machine, runtime and number of threads: measured once, known by structure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from typing_extensions import TypedDict

from torchslim.artifact.latency import compare
from torchslim.core.files import digest, present, write_json
from torchslim.core.folder_lock import holding
from torchslim.core.hardware import cache_folder, describe_machine
from torchslim.core.isolation import warn
from torchslim.core.measurement import Measurement
from torchslim.core.schema import Schema
from torchslim.errors import ArtifactError
from torchslim.report.records import STRICT
from torchslim.runtimes import Deployed

FORMAT = "torchslim-latency"
ROUNDS = 40
SECONDS = 20.0  # for all programs of one comparison
BUSY = 0.9  # of a reference's time: what is measured below was measured on a quieter machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The time of a program over that of a reference, from paired rounds, and its milliseconds beside it."""

    ratio: Measurement
    latency: Measurement

    def to_entry(self) -> dict[str, Any]:
        """The timing as the file keeps it."""
        ratio, low, high = self.ratio.value, self.ratio.p10, self.ratio.p90
        assert low is not None, "a ratio from paired rounds has a spread"
        assert high is not None
        return {"ratio": ratio, "low": low, "high": high, "ms": self.latency.value, "rounds": self.latency.rounds}

    def as_kept(self) -> Timing:
        """The timing as it is read again: without the spread of its milliseconds, which the file does not keep."""
        return Timing.from_entry(self.to_entry())

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Timing:
        """The timing that the file keeps."""
        ratio = Measurement(value=entry["ratio"], unit="x", p10=entry["low"], p90=entry["high"], rounds=entry["rounds"])
        return cls(ratio=ratio, latency=Measurement(value=entry["ms"], unit="ms", rounds=entry["rounds"]))


class _Entry(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    ratio: Annotated[float, Gt(0), Le(1e12)]
    low: Annotated[float, Gt(0), Le(1e12)]
    high: Annotated[float, Gt(0), Le(1e12)]
    ms: Annotated[float, Gt(0), Le(1e12)]
    rounds: Annotated[int, Ge(1), Le(10**12)]


class _Table(TypedDict):
    """The file: by the reference's structure, and the program's."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    format: Literal["torchslim-latency"]
    about: dict[str, Any]
    entries: dict[str, dict[str, _Entry]]


TABLE: Schema[_Table] = Schema(_Table, "a table of latencies", ArtifactError, mend="delete it, or name another")


class LatencyTable:
    """What is known of a machine: by the reference's structure, the timings of programs by their structure.

    Args:
        runtime: whose programs are timed.
        threads: of the deployment; None leaves it to the runtime.
        path: the file; by default one in `cache_folder()` for this machine, runtime and number of threads.
        batch: samples a call.
    """

    def __init__(
        self, runtime: str, threads: int | None = None, *, path: str | Path | None = None, batch: int | None = None
    ) -> None:
        self.runtime, self.threads, self.batch = runtime, threads, batch
        machine = describe_machine(threads)
        self.about: dict[str, Any] = {
            "runtime": runtime,
            "threads": threads,
            "batch": batch,
            **{key: machine[key] for key in ("processor", "instruction_set", "cores", "versions")},
        }
        self.given = path is not None  # a file that the user has named is not replaced where it is something else
        self.path = Path(path) if path else cache_folder() / "latency" / f"{runtime}-{digest(self.about)[:16]}.json"

    def known(self, reference: str) -> dict[str, Timing]:
        """Timings over a reference, by structure.

        Raises:
            ArtifactError: the file that was named as `path` is damaged, or no table of this machine and runtime. One in
                `cache_folder()` is measured again instead, with a warning.
        """
        return {key: Timing.from_entry(entry) for key, entry in self._read().get(reference, {}).items()}

    def measure(
        self,
        deployed: Mapping[str, Deployed],
        reference: Deployed,
        *,
        again: bool = False,
        rounds: int = ROUNDS,
        seconds: float = SECONDS,
    ) -> dict[str, Timing]:
        """Timings of deployed models over the reference's; what the file knows is not measured, unless `again`."""
        first = reference.spec.structure
        known = {} if again else self.known(first)
        structures = {name: model.spec.structure for name, model in deployed.items()}
        missing = {key: deployed[name] for name, key in structures.items() if key not in known and key != first}
        if first not in known or missing:
            timings = compare({first: reference} | missing, batch=self.batch, rounds=rounds, seconds=seconds)
            new = [*missing] if first in known else [first, *missing]  # a reference keeps its first figure
            for key in new:
                known[key] = Timing(ratio=timings.speedup(first, key), latency=timings.latency(key)).as_kept()
            self.add(first, {key: known[key] for key in new})
        return {name: known[key] for name, key in structures.items()}

    def settle(self, reference: Deployed) -> Timing:
        """The reference's own time, measured once more: markedly lower than what is known, the machine was busy then.

        Ratios from paired rounds bear a busy machine, milliseconds do not. What is within the noise changes nothing,
        so that the same search finds the same figures again.
        """
        first = reference.spec.structure
        before = self.measure({"it": reference}, reference)["it"]
        took = compare({first: reference}, batch=self.batch, rounds=ROUNDS, seconds=SECONDS).latency(first)
        if took.value >= BUSY * before.latency.value:
            return before
        latency = Measurement(value=took.value, unit="ms", rounds=took.rounds)
        timing = Timing(ratio=replace(before.ratio, rounds=took.rounds), latency=latency)
        self.add(first, {first: timing})
        return timing

    def add(self, reference: str, timings: Mapping[str, Timing]) -> None:
        """Keep timings; what other processes have added meanwhile stays."""
        with holding(self.path.with_name(f".{self.path.name}.lock"), lambda who: None):  # held for a moment only
            entries = self._read()
            entries.setdefault(reference, {}).update({key: timing.to_entry() for key, timing in timings.items()})
            write_json(self.path, {"format": FORMAT, "about": self.about, "entries": entries})

    def _read(self) -> dict[str, dict[str, Any]]:
        if not present(self.path):
            return {}
        try:
            found = TABLE.read(self.path)
            if found["about"] != json.loads(json.dumps(self.about)):
                raise ArtifactError(f"{self.path} is about another machine or runtime; delete it, or name another")
        except ArtifactError as error:
            if self.given:
                raise
            warn(f"{error}; it is measured again")
            return {}
        entries: dict[str, dict[str, Any]] = found["entries"]
        return entries
