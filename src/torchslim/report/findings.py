"""What a run has to say, in words: told once, and shown by the page and the table alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchslim.report.numbers import (
    Entry,
    faster,
    metric_text,
    ratio_text,
    significant,
    sized,
    smaller,
    value_of,
    with_unit,
)

Run = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What one step did, against the step before it."""

    label: str
    size: str
    latency: str
    metric: str
    seconds: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """One round of a cut to a ceiling of latency; times are over that of the model that the step received."""

    label: str  # of the step, and of its cut where there are several
    round: int
    ceiling: float
    predicted: float
    measured: float | None
    chosen: bool
    about: str  # of the cut as a whole

    @property
    def share(self) -> float | None:
        """Of the ceiling, what was measured."""
        return None if self.measured is None else self.measured / self.ceiling


@dataclass(slots=True, kw_only=True)
class Layer:
    """What all steps together did to one layer."""

    name: str
    sparsity: float | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    sqnr_db: float | None = None
    kernel: str = ""
    integer: bool | None = None
    notes: list[tuple[str, str, str]] = field(default_factory=list)  # step, action, reason

    @property
    def refused(self) -> bool:
        return any(action == "refused" for _, action, _ in self.notes)


def reported_split(run: Run) -> str:
    """The split that the report's metric is on."""
    return str(run["reported_on"]).partition(" ")[0]


def provenance(run: Run) -> str:
    """Which data chose the model and which data judged it."""
    split = reported_split(run)
    line = f"selected on {run['selected_on']}, reported on {split}"
    if split == run["selected_on"]:
        return f"{line}: there is no test split, so the figure is optimistic"
    return line


def batch_words(run: Run) -> str:
    """How many samples a timed call takes."""
    batch = run["batch"]
    if batch == 1:
        return "one sample a call"
    return f"{batch} samples a call" if isinstance(batch, int) else f"batch {batch}"


def labels(rows: Sequence[Row]) -> list[str]:
    """The rows' names; where a step is taken twice, numbered."""
    names = [str(row["name"]) for row in rows]
    return [
        name if names.count(name) == 1 else f"{name} #{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


def metric_entry(run: Run, row: Row) -> Entry:
    """The row's metric on the split that is reported."""
    entry: Entry = row["metric"][reported_split(run)]
    return entry


def latency_entry(run: Run, row: Row) -> Entry:
    """The row's latency on the runtime that it is deployed on."""
    entry: Entry = row["latency_ms"][run["target"]["runtime"]]
    return entry


def warnings(run: Run) -> list[tuple[str, list[str]]]:
    """Each warning once, with the steps that gave it."""
    found: dict[str, list[str]] = {}
    for label, row in zip(labels(run["rows"]), run["rows"], strict=True):
        for warning in row["warnings"]:
            steps = found.setdefault(warning, [])
            if label not in steps:
                steps.append(label)
    return list(found.items())


def gaps(run: Run, entries: Iterable[tuple[str, str, Entry]]) -> list[str]:
    """Why what is missing is missing, once a reason: "size of prune, distill: no file"."""
    found: dict[tuple[str, str], list[str]] = {}
    for label, what, entry in entries:
        if "not_measured" in entry:
            found.setdefault((what, entry["not_measured"]), []).append(label)
    every = len(run["rows"])
    return [
        f"{what} of {'all rows' if len(rows) == every else ', '.join(rows)}: {reason}"
        for (what, reason), rows in found.items()
    ]


def gains(run: Run) -> list[Gain]:
    """What each step alone gained, "none" included."""
    rows = run["rows"]
    return [
        Gain(
            label=label,
            size=_size_change(before["size_bytes"], row["size_bytes"]),
            latency=_latency_change(row["speedup"]["over_previous"]),
            metric=metric_change(run, before, row),
            seconds=row["seconds"],
        )
        for before, row, label in zip(rows, rows[1:], labels(rows)[1:], strict=False)
        if row["kind"] == "step"
    ]


def _size_change(before: Entry, after: Entry) -> str:
    old, new = value_of(before), value_of(after)
    if old is None or new is None:
        return "not measured"
    if old == new:
        return "none"
    return f"{smaller(old, new)} ({'-' if new < old else '+'}{sized(abs(new - old))})"


def _latency_change(speedup: Entry) -> str:
    ratio = value_of(speedup)
    if ratio is None:
        return "not measured"
    low, high = speedup.get("low", ratio), speedup.get("high", ratio)
    if speedup["verdict"] == "no difference":
        return f"none ({times(ratio)} [{ratio_text(low)}-{ratio_text(high)}])"
    if ratio < 1:
        low, high = 1 / high, 1 / low
    return f"{faster(ratio)} [{ratio_text(low)}-{ratio_text(high)}]"


def times(ratio: float) -> str:
    """A ratio: "1.80x"."""
    return f"{ratio_text(ratio)}x"


def metric_change(run: Run, before: Row, after: Row) -> str:
    """The metric's difference between two rows, and whether it is for the better."""
    old, new = value_of(metric_entry(run, before)), value_of(metric_entry(run, after))
    if old is None or new is None:
        return "not measured"
    if old == new:
        return "unchanged"
    unit = run["metric"]["unit"]
    text = metric_text(abs(new - old), unit)
    if float(text) == 0:
        text = significant(abs(new - old), 2)
    amount = f"{text} points" if unit == "%" else with_unit(text, unit)
    return f"{amount} {'better' if (new > old) == run['metric'].get('higher_is_better', True) else 'worse'}"


def summary(run: Run) -> str:
    """The whole run in a sentence: the metric before and after, how much smaller, how much faster."""
    first, last = run["rows"][0], run["rows"][-1]
    metric, unit, runtime = run["metric"]["name"], run["metric"]["unit"], run["target"]["runtime"]
    old, new = value_of(metric_entry(run, first)), value_of(metric_entry(run, last))
    if old is None or new is None:
        told = [f"{metric} on {reported_split(run)} was not measured"]
    else:
        told = [
            f"{metric} on {reported_split(run)} goes from {with_unit(metric_text(old, unit), unit)} to "
            f"{with_unit(metric_text(new, unit), unit)} ({metric_change(run, first, last)})"
        ]
    before, after = value_of(first["size_bytes"]), value_of(last["size_bytes"])
    if before is None or after is None:
        told.append("its size was not measured")
    else:
        change = smaller(before, after)
        told.append("what ships is as large as before" if change == "none" else f"what ships is {change}")
    ratio = value_of(last["speedup"]["over_baseline"])
    if ratio is None:
        told.append(f"its latency on {runtime} was not measured")
    elif last["speedup"]["over_baseline"]["verdict"] == "no difference":
        told.append(f"its latency on {runtime} shows no difference")
    else:
        told.append(f"it runs {faster(ratio)} on {runtime}")
    return f"{told[0]}; {told[1]}, and {told[2]}."


def layers(run: Run) -> list[Layer]:
    """A line per layer, in the order in which the steps touched them; the last step's figure counts."""
    found: dict[str, Layer] = {}
    for label, row in zip(labels(run["rows"]), run["rows"], strict=True):
        for record in row["layers"]:
            if not record["layer"]:
                continue  # about the model as a whole
            # pruning names the parameter and quantization its module: one layer, one line
            name = record["layer"].removesuffix(".weight")
            layer = found.setdefault(name, Layer(name=name))
            for key in ("sparsity", "weight_bits", "activation_bits", "sqnr_db", "kernel", "integer"):
                if record.get(key) not in (None, ""):
                    setattr(layer, key, record[key])
            note = (label, record["action"], record["reason"])
            if (record["reason"] or record["action"] == "refused") and note not in layer.notes:
                layer.notes.append(note)
    return list(found.values())


def ceilings(run: Run) -> list[Ceiling]:
    """What was predicted of latencies and what was measured, a line for each round."""
    found = []
    for label, row in zip(labels(run["rows"]), run["rows"], strict=True):
        cuts = row.get("evidence", {}).get("latency", [])
        for number, cut in enumerate(cuts, 1):
            about = f"times of {cut['programs']} narrowed programs, taken {_taken(cut['elsewhere'])}"
            found += [
                Ceiling(
                    label=f"{label}, cut {number}" if len(cuts) > 1 else label,
                    round=place,
                    ceiling=cut["ceiling"],
                    predicted=each["predicted"],
                    measured=each["measured"],
                    chosen=place == cut["best"],
                    about=about,
                )
                for place, each in enumerate(cut["rounds"], 1)
            ]
    return found


def _taken(elsewhere: str) -> str:
    return f"on {elsewhere}" if elsewhere else "on this machine"
