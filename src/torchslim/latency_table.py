"""Times of programs on one machine, runtime and number of threads: measured once, known by structure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchslim.errors import ArtifactError
from torchslim.files import digest, write_json
from torchslim.machine import cache_folder, describe_machine
from torchslim.measure import compare
from torchslim.runtimes import Deployed

FORMAT = "torchslim-latency"
ROUNDS = 40
SECONDS = 20.0  # for all programs of one comparison
BUSY = 0.9  # of a reference's time: what is measured below was measured on a quieter machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The time of a program over that of a reference, from paired rounds, and its milliseconds beside it."""

    ratio: float
    low: float  # p10 of the ratio
    high: float  # p90
    ms: float  # median
    rounds: int


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
        self.path = Path(path) if path else cache_folder() / "latency" / f"{runtime}-{digest(self.about)[:16]}.json"

    def known(self, reference: str) -> dict[str, Timing]:
        """Timings over a reference, by structure.

        Raises:
            ArtifactError: the file is none of torchslim's.
        """
        return {key: Timing(**each) for key, each in self._read().get(reference, {}).items()}

    def measure(
        self, deployed: Mapping[str, Deployed], reference: Deployed, *, again: bool = False, rounds: int = ROUNDS,
        seconds: float = SECONDS,
    ) -> dict[str, Timing]:  # fmt: skip
        """Timings of deployed models over the reference's; what the file knows is not measured, unless `again`."""
        first = reference.spec.structure
        known = {} if again else self.known(first)
        structures = {name: each.spec.structure for name, each in deployed.items()}
        missing = {
            key: deployed[name]
            for name, key in structures.items()
            if key not in known and key != first
        }  # fmt: skip
        if first not in known or missing:
            timings = compare({first: reference} | missing, batch=self.batch, rounds=rounds, seconds=seconds)
            new = [*missing] if first in known else [first, *missing]  # a reference keeps its first figure
            for key in new:
                over, took = timings.speedup(first, key), timings.latency(key)
                known[key] = Timing(ratio=over.median, low=over.p10, high=over.p90, ms=took.median, rounds=took.rounds)
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
        if took.median >= BUSY * before.ms:
            return before
        found = replace(before, ms=took.median, rounds=took.rounds)
        self.add(first, {first: found})
        return found

    def add(self, reference: str, timings: Mapping[str, Timing]) -> None:
        """Keep timings; what other processes have added meanwhile stays."""
        entries = self._read()
        entries.setdefault(reference, {}).update({key: asdict(each) for key, each in timings.items()})
        write_json(self.path, {"format": FORMAT, "about": self.about, "entries": entries})

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        try:
            found = json.loads(self.path.read_text())
            if found["format"] != FORMAT:
                raise KeyError("format")
            return dict(found["entries"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{self.path} is no table of latencies: {error}; delete it, or name another") from error
