"""What a search ends with: its front, and all that its report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torchslim._version import __version__
from torchslim.artifact.peak_memory import peak_memory
from torchslim.core.budget import UNITS, Budget
from torchslim.core.hardware import describe_machine
from torchslim.core.isolation import warn
from torchslim.core.measurement import THIS_MACHINE, Measurement
from torchslim.core.metrics import Metric
from torchslim.core.step import Target
from torchslim.errors import ArtifactError
from torchslim.pipeline.result import Result
from torchslim.pipeline.run_record import not_measured, number
from torchslim.report import load_run, search_table
from torchslim.tuning.pareto import Verdict, front_of, judge
from torchslim.tuning.space import Space

FORMAT = 1
Results = Sequence[tuple[int, Mapping[str, Any], Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Member:
    """A candidate that was trained fully and measured as an artifact.

    Attributes:
        trial: its number.
        values: of the parameters.
        figures: measured, by the names of `budget.UNITS`.
        within: does it keep all bounds?
        folder: the artifact, with `recipe.toml` beside it; on the machine that made it.
        result: of the run, where this process made it.
    """

    trial: int
    values: Mapping[str, Any]
    figures: Mapping[str, float]
    within: bool
    folder: Path
    result: Result | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search returns. `print(result)` shows the front; `data` is what `search.json` holds."""

    front: tuple[Member, ...]
    verdict: Verdict
    data: dict[str, Any]
    folder: Path

    @property
    def best(self) -> Member | None:
        """Within the budget and best in the first objective; or the nearest to the budget."""
        return next((each for each in self.front if each.trial == self.verdict.nearest), None)

    def __str__(self) -> str:
        return search_table(self.data)

    @classmethod
    def of(cls, data: dict[str, Any], folder: Path, results: Mapping[int, Result]) -> SearchResult:
        """From what `search.json` holds, and the runs that this process has made."""
        members = tuple(
            Member(
                trial=point["trial"],
                values=point["parameters"],
                figures={name: entry["value"] for name, entry in point["figures"].items()},
                within=point["within"],
                folder=folder / point["folder"],
                result=results.get(point["trial"]),
            )
            for point in data["front"]
        )
        verdict = Verdict(**{**data["verdict"], "binding": tuple(data["verdict"]["binding"])})
        return cls(front=members, verdict=verdict, data=data, folder=folder)


def entries_of(
    result: Result, target: Target, base: Mapping[str, float], metric: Metric, budget: Budget
) -> dict[str, dict[str, Any]]:
    """All figures of an artifact, with spread where they have one; the latency is paired with the baseline's."""
    row = result.run["rows"][-1]
    unit = metric.unit or "1"
    before, after = (result.run["rows"][index]["metric"]["val"]["value"] for index in (0, -1))
    drop = before - after if metric.higher_is_better else after - before
    found = {"metric_drop": number(drop, unit)}
    known = result.deployed.size_bytes
    if known is not None:
        found["size"] = number(known / 1e6, UNITS["size"])
    ratio = row["speedup"]["over_baseline"]
    median = base.get("latency") or result.run["rows"][0]["latency_ms"][target.runtime]["value"]
    found["latency"] = Measurement(
        value=median / ratio["value"],
        unit=UNITS["latency"],
        p10=median / ratio["high"],
        p90=median / ratio["low"],
        rounds=ratio["repeats"],
        machine=THIS_MACHINE,
    ).to_dict()
    found["macs"] = number(row["macs"]["value"], UNITS["macs"])
    found["params"] = number(row["parameters"]["value"], UNITS["params"])
    if "peak_memory" in budget.figures:
        found["peak_memory"] = number(peak_memory(result.deployed) / 1e6, UNITS["peak_memory"], machine="this")
    return found


def data_of(
    space: Space,
    metric: Metric,
    target: Target,
    base: Mapping[str, float],
    rows: Results,
    finals: Results,
    folder: Path,
) -> dict[str, Any]:
    """The content of `search.json`.

    Args:
        target: the first that was searched on; `base` are the original's figures there.
        rows: the trials' number, values and result; finals: those of the candidates that were taken in full.
        folder: of the search, whose runs know the original's other figures.
    """
    budget = space.budget
    known = {number for number, _, _ in rows}
    done = {each["trial"]: each for _, _, each in finals if each["state"] == "measured" and each["trial"] in known}
    figures = {
        chosen: {name: entry["value"] for name, entry in each["figures"].items()} for chosen, each in done.items()
    }
    verdict = judge(figures, budget, {**UNITS, "metric_drop": metric.unit})
    shown = front_of(figures, budget.objectives)
    if verdict.nearest is not None and verdict.nearest not in shown:
        shown.append(verdict.nearest)
    values = {chosen: given for chosen, given, _ in rows}
    original: dict[str, Any] = next((_original(folder / "runs" / f"{chosen:03d}", target) for chosen in done), {})
    return {
        "format": FORMAT,
        "kind": "search",
        "torchslim": __version__,
        "recipe": {key: space.document.get(key) for key in ("model", "task")},
        "space": [parameter.to_dict() for parameter in space.parameters],
        "budget": {
            field_.name: value for field_ in fields(budget) if (value := getattr(budget, field_.name)) not in (None, ())
        },
        "objectives": list(budget.objectives),
        "metric": {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better},
        "target": asdict(target),
        "baseline": {
            "metric": {
                "val": number(base["metric"], metric.unit or "1"),
                "test": original.get("test", not_measured("no candidate was measured")),
            },
            "figures": original.get("figures", {})
            | {name: number(base[name], UNITS[name]) for name in UNITS if name in base},
        },
        "trials": [_trial(number, parameters, trial) for number, parameters, trial in rows],
        "failed": [
            {"trial": each["trial"], "reason": each["reason"]}
            for _, _, each in finals
            if each["state"] == "failed" and "trial" in each
        ],
        "front": [
            _member(chosen, values[chosen], done[chosen])
            for chosen in sorted(shown, key=lambda chosen: [figures[chosen][name] for name in budget.objectives])
        ],
        "verdict": asdict(verdict) | {"binding": list(verdict.binding)},
        "machines": {"this": describe_machine(target.threads)},
    }


def _trial(number: int, parameters: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's row."""
    figures = trial.get("figures", {})
    return {
        "number": number,
        "parameters": parameters,
        **{name: trial[name] for name in ("state", "stage", "reason")},
        "figures": figures,
        "seconds": trial.get("seconds", 0.0),
        "within": bool(figures) and max(trial["excess"].values(), default=0.0) <= 0,
    }


def _member(number: int, parameters: Mapping[str, Any], final: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a member of the front."""
    return {
        "trial": number,
        "parameters": parameters,
        "recipe": f"front/{number:03d}/recipe.toml",
        "folder": f"front/{number:03d}",
        **{name: final[name] for name in ("metric", "figures", "within")},
    }


def _original(run_folder: Path, target: Target) -> dict[str, Any]:
    """The original, as the run of a candidate on this target has measured it."""
    if not (run_folder / "run.json").is_file():
        return {}  # it was made on another machine
    try:
        run = load_run(run_folder)
    except ArtifactError as error:
        warn(f"{error}; the original's size and metric on test are left out of the report")
        return {}
    row = run["rows"][0]
    figures = {
        "macs": number(row["macs"]["value"], UNITS["macs"]),
        "params": number(row["parameters"]["value"], UNITS["params"]),
    }
    if "value" in row["size_bytes"]:
        figures["size"] = number(row["size_bytes"]["value"] / 1e6, UNITS["size"])
    if run["target"]["runtime"] == target.runtime:
        figures["latency"] = row["latency_ms"][target.runtime]
    return {"test": row["metric"]["test"], "figures": figures}
