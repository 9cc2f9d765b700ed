"""Times of packed artifacts, as bench.py or phone.sh writes them on another machine: data that is not trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from torchslim.artifact.latency import Timings
from torchslim.core.json_types import STRICT, Hash, Name, Size
from torchslim.core.schema import MIB, Limits, Schema
from torchslim.errors import ArtifactError

TIMES = "torchslim-times"
TIMES_FILE = "times.json"
MOST_PROGRAMS = 64
LIMITS = Limits(size_bytes=16 * MIB, values=1_000_000, depth=8)

Word = Annotated[str, Field(max_length=200)]


class MachineJson(TypedDict):
    """The machine that the times are of."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    processor: Annotated[Word, Field(min_length=1)]
    architecture: Word
    cores: Annotated[int, Field(ge=1, le=100_000)] | None
    system: Word


class ProgramJson(TypedDict):
    """Milliseconds of one program by round; round i of all programs was measured side by side."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    name: Name
    program: Hash
    runtime: Word
    threads: Annotated[int, Field(ge=1, le=65_536)] | None
    inputs: Annotated[list[Annotated[list[Size], Field(max_length=64)]], Field(max_length=1_000)]
    largest_difference: Annotated[float, Field(ge=0, le=1e300)] | None
    ms: Annotated[list[Annotated[float, Field(gt=0, le=1e9)]], Field(min_length=1, max_length=100_000)]


class TimesJson(TypedDict):
    """Content of times.json."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    format: Literal["torchslim-times"]
    version: Literal[1]
    machine: MachineJson
    programs: Annotated[list[ProgramJson], Field(min_length=1, max_length=MOST_PROGRAMS)]


def _paired(times: TimesJson) -> str | None:
    rounds = {len(program["ms"]) for program in times["programs"]}
    return f"the programs have different numbers of rounds, {sorted(rounds)}" if len(rounds) > 1 else None


SCHEMA: Schema[TimesJson] = Schema(
    TimesJson, TIMES_FILE, ArtifactError, limits=LIMITS, mend="time the programs again", also=_paired
)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Checked times of programs on one machine.

    Attributes:
        machine: its description, as text and numbers.
        programs: for each program its name, digest, threads, shapes of its inputs, and largest difference.
        timings: by the programs' positions, "0", "1" and so on.
    """

    machine: Mapping[str, Any]
    programs: list[dict[str, Any]]
    timings: Timings

    @classmethod
    def parse(cls, data: bytes, what: str = TIMES_FILE) -> Times:
        """The times in a JSON text.

        Raises:
            ArtifactError: damaged, or values that no measurement gives.
        """
        times: Any = SCHEMA.parse(data, what)
        rounds = {str(number): program["ms"] for number, program in enumerate(times["programs"])}
        about = [{key: value for key, value in program.items() if key != "ms"} for program in times["programs"]]
        return cls(machine=dict(times["machine"]), programs=about, timings=Timings(rounds))

    def named(self) -> Timings:
        """The timings by the programs' names; equal names get their positions."""
        names = [program["name"] for program in self.programs]
        unique = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]
        return Timings(dict(zip(unique, self.timings.rounds.values(), strict=True)))
