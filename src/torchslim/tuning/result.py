"""The result of a search: its front, and the content of `search.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torchslim._version import __version__
from torchslim.artifact.assembled import pieces
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
from torchslim.report import explanation_text, load_run, search_table
from torchslim.tuning.pareto import Verdict, front_of, judge
from torchslim.tuning.space import Space

FORMAT = 1
Results = Sequence[tuple[int, Mapping[str, Any], Mapping[str, Any]]]
"""Number, parameter values and result of every trial."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A finalist on the front: trained in full, and measured as an artifact.

    Attributes:
        trial: number of the trial.
        values: values of the parameters, by name.
        figures: measured figures, by the names of `budget.UNITS`.
        within: whether all bounds hold.
        folder: folder of the artifact and its `recipe.toml`; it exists on the machine that ran the finalist.
        result: result of the run; None if another process ran it.
    """

    trial: int
    values: Mapping[str, Any]
    figures: Mapping[str, float]
    within: bool
    folder: Path
    result: Result | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The result of a search; `print` shows the front.

    Attributes:
        front: finalists that no other finalist beats in every objective, and the nearest to the budget.
        verdict: whether the budget is met, and by which finalist.
        data: content of `search.json`.
        folder: folder of the search.
    """

    front: tuple[Member, ...]
    verdict: Verdict
    data: dict[str, Any]
    folder: Path

    @property
    def best(self) -> Member | None:
        """Best member in the first objective within the budget, or else the nearest to the budget; None if none is."""
        return next((member for member in self.front if member.trial == self.verdict.nearest), None)

    def __str__(self) -> str:
        return search_table(self.data)

    def explain(self) -> str:
        """Text with what each member's choices bought for their damage, what was refused, and predicted figures."""
        return explanation_text(self.data)

    @classmethod
    def of(cls, data: dict[str, Any], folder: Path, results: Mapping[int, Result]) -> SearchResult:
        """Build the result from the content of `search.json` and the runs of this process, by trial."""
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
    """Entries of all figures of an artifact, as `search.json` holds them.

    Args:
        result: run of the finalist.
        target: the runtime, and its threads.
        base: figures of the original on the target; the latency, in ms, is its latency over the measured speed-up.
        metric: metric of the task.
        budget: figures that are measured only if a budget names them.
    """
    row = result.run["rows"][-1]
    before, after = (result.run["rows"][index]["metric"]["val"]["value"] for index in (0, -1))
    drop = before - after if metric.higher_is_better else after - before
    entries = {"metric_drop": number(drop, metric.unit or "1")}
    size_bytes = result.deployed.size_bytes
    if size_bytes is not None:
        entries["size"] = number(size_bytes / 1e6, UNITS["size"])
    ratio = row["speedup"]["over_baseline"]
    median = base.get("latency") or result.run["rows"][0]["latency_ms"][target.runtime]["value"]
    entries["latency"] = Measurement(
        value=median / ratio["value"],
        unit=UNITS["latency"],
        p10=median / ratio["high"],
        p90=median / ratio["low"],
        rounds=ratio["repeats"],
        machine=THIS_MACHINE,
    ).to_dict()
    entries["macs"] = number(row["macs"]["value"], UNITS["macs"])
    entries["params"] = number(row["parameters"]["value"], UNITS["params"])
    if "peak_memory" in budget.figures:
        entries["peak_memory"] = number(
            sum(map(peak_memory, pieces(result.deployed).values())) / 1e6, UNITS["peak_memory"], machine="this"
        )
    return entries


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The measurements of a search.

    Args:
        target: the first target of the search.
        baseline: figures of the original on the target, and its "metric" on val.
        trials: results of the trials.
        finals: results of the finalists.
        explained: explanations by trial, of a solved search.
        spent: seconds and epochs by what a solved search spent them on.
    """

    target: Target
    baseline: Mapping[str, float]
    trials: Results
    finals: Results
    explained: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)

    def measured(self) -> dict[int, Mapping[str, Any]]:
        """Results of the finalists that were measured, by trial."""
        numbers = {number for number, _, _ in self.trials}
        return {
            final["trial"]: final
            for _, _, final in self.finals
            if final["state"] == "measured" and final["trial"] in numbers
        }

    def failed(self) -> list[dict[str, Any]]:
        """Trial and reason of every finalist that failed."""
        return [
            {"trial": final["trial"], "reason": final["reason"]}
            for _, _, final in self.finals
            if final["state"] == "failed" and "trial" in final
        ]


def data_of(space: Space, metric: Metric, findings: Findings, folder: Path) -> dict[str, Any]:
    """Return the content of `search.json`.

    Args:
        space: searched space, with its budget.
        metric: metric of the task.
        findings: measurements of the search.
        folder: folder of the search; its runs hold further figures of the original.
    """
    budget, target = space.budget, findings.target
    measured = findings.measured()
    figures = {
        trial: {name: entry["value"] for name, entry in final["figures"].items()} for trial, final in measured.items()
    }
    verdict = judge(figures, budget, {**UNITS, "metric_drop": metric.unit})
    front = front_of(figures, budget.objectives)
    if verdict.nearest is not None and verdict.nearest not in front:
        front.append(verdict.nearest)
    front.sort(key=lambda trial: [figures[trial][name] for name in budget.objectives])
    values = {number: parameters for number, parameters, _ in findings.trials}
    run_folders = [folder / "runs" / f"{trial:03d}" for trial in measured]
    return {
        "format": FORMAT,
        "kind": "search",
        "torchslim": __version__,
        "recipe": {key: space.document.get(key) for key in ("model", "task")},
        "space": [parameter.to_dict() for parameter in space.parameters],
        "budget": _settings(budget),
        "objectives": list(budget.objectives),
        "metric": {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better},
        "target": asdict(target),
        "baseline": _baseline(findings, metric, run_folders),
        "trials": [_trial(number, parameters, trial) for number, parameters, trial in findings.trials],
        "failed": findings.failed(),
        **({"spent": dict(findings.spent)} if findings.spent else {}),
        "front": [
            _member(trial, values[trial], measured[trial])
            | ({"explained": findings.explained[trial]} if trial in findings.explained else {})
            for trial in front
        ],
        "verdict": asdict(verdict) | {"binding": list(verdict.binding)},
        "machines": {"this": describe_machine(target.threads)},
    }


def _baseline(findings: Findings, metric: Metric, run_folders: Sequence[Path]) -> dict[str, Any]:
    """The original's row: figures that the search measured, and others from the first run of a finalist."""
    target, base = findings.target, findings.baseline
    original = _original(run_folders[0], target) if run_folders else {}
    searched = {name: number(base[name], UNITS[name]) for name in UNITS if name in base}
    return {
        "metric": {
            "val": number(base["metric"], metric.unit or "1"),
            "test": original.get("test", not_measured("no candidate was measured")),
        },
        "figures": original.get("figures", {}) | searched,
    }


def _settings(budget: Budget) -> dict[str, Any]:
    """Fields of the budget that are set."""
    values = {field_.name: getattr(budget, field_.name) for field_ in fields(budget)}
    return {name: value for name, value in values.items() if value not in (None, ())}


def _trial(number: int, parameters: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a trial."""
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
    """Metric on test and figures of the original, as the run of a finalist measured them; empty without that run."""
    if not (run_folder / "run.json").is_file():
        return {}  # another machine ran the finalist
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
