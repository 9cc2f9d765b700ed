"""Findings of a run, in words, for both the page and the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torchslim.report.numbers import (
    duration,
    faster,
    is_measured,
    metric_text,
    ratio_text,
    significant,
    sized,
    smaller,
    value_of,
    with_unit,
)
from torchslim.report.records import Entry, Ratio, Row, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Effect of one step, compared with the row before it."""

    label: str
    size: str
    latency: str
    metric: str
    seconds: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """One attempt to reach a latency ceiling; times are over the time of the model that the step received."""

    label: str  # of the step, and of the cut if the step has several
    round: int
    ceiling: float
    predicted: float
    measured: float | None
    chosen: bool
    about: str  # programs and machine of the cut's times

    @property
    def share(self) -> float | None:
        """Measured time over the ceiling; None if not measured."""
        return None if self.measured is None else self.measured / self.ceiling


@dataclass(slots=True, kw_only=True)
class Layer:
    """Combined effect of all steps on one layer."""

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
    """Name of the split on which the metric is reported."""
    return str(run["reported_on"]).partition(" ")[0]


def provenance(run: Run) -> str:
    """Splits on which the model was selected and reported, in words."""
    split = reported_split(run)
    line = f"selected on {run['selected_on']}, reported on {split}"
    if split == run["selected_on"]:
        return f"{line}: there is no test split, so the figure is optimistic"
    return line


def time_words(run: Run) -> str:
    """The time that the run took and the forecast, in words; empty where nothing was forecast."""
    forecast = run.get("forecast")
    timed = [
        (part["name"], part["took"], part["seconds"])
        for part in (() if forecast is None else forecast["parts"])
        if part["seconds"] is not None and "took" in part
    ]
    if not timed:
        return ""
    details = [f"{name} {duration(took)} ({duration(seconds)})" for name, took, seconds in timed]
    total, foreseen = sum(took for _, took, _ in timed), sum(seconds for _, _, seconds in timed)
    return f"time (forecast): {duration(total)} ({duration(foreseen)}): {', '.join(details)}"


def batch_words(run: Run) -> str:
    """Number of samples in a timed call, and its sizes where they vary, in words."""
    batch = run["batch"]
    words = f"{batch} samples a call" if isinstance(batch, int) else f"batch {batch}"
    if batch == 1:
        words = "one sample a call"
    if "sizes" in run:
        words += f", at the median size {run['sizes']['median']} and at the largest {run['sizes']['largest']}"
    return words


def labels(rows: Sequence[Row]) -> list[str]:
    """Names of the rows, numbered if a step occurs several times."""
    names = [str(row["name"]) for row in rows]
    return [
        name if names.count(name) == 1 else f"{name} #{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


def metric_entry(run: Run, row: Row) -> Entry:
    """Metric of the row on the reported split."""
    return row["metric"][reported_split(run)]


def latency_entry(run: Run, row: Row, *, largest: bool = False) -> Entry:
    """Latency of the row on the target runtime; that of the largest inputs where sizes vary."""
    return row["latency_largest_ms" if largest else "latency_ms"][run["target"]["runtime"]]


def part_latencies(run: Run) -> list[str]:
    """A line for every deployed part of a model: its latency alone on the target runtime, before and after the run."""
    begin = f"{run['target']['runtime']}, part "
    first, last = run["rows"][0]["latency_ms"], run["rows"][-1]["latency_ms"]
    lines = []
    for name in (key for key in first if key.startswith(begin) and key in last):
        values = [value_of(first[name]), value_of(last[name])]
        before, after = ("not measured" if value is None else f"{significant(value)} ms" for value in values)
        lines.append(f"one call of {name.removeprefix(begin)} alone: {before} before, {after} after")
    return lines


def warnings(run: Run) -> list[tuple[str, list[str]]]:
    """Distinct warnings, with the steps that gave them."""
    steps_by_warning: dict[str, list[str]] = {}
    for label, row in zip(labels(run["rows"]), run["rows"], strict=True):
        for warning in row["warnings"]:
            steps = steps_by_warning.setdefault(warning, [])
            if label not in steps:
                steps.append(label)
    return list(steps_by_warning.items())


def gaps(run: Run, entries: Iterable[tuple[str, str, Entry]]) -> list[str]:
    """Missing entries, one text for each name and reason: "size of prune, distill: no file"."""
    rows_by_gap: dict[tuple[str, str], list[str]] = {}
    for label, what, entry in entries:
        if not is_measured(entry):
            rows_by_gap.setdefault((what, entry["not_measured"]), []).append(label)
    total = len(run["rows"])
    return [
        f"{what} of {'all rows' if len(rows) == total else ', '.join(rows)}: {reason}"
        for (what, reason), rows in rows_by_gap.items()
    ]


def gains(run: Run) -> list[Gain]:
    """Gain of every step alone, including "none"."""
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


def _latency_change(speedup: Ratio) -> str:
    if not is_measured(speedup):
        return "not measured"
    ratio = speedup["value"]
    low, high = speedup.get("low", ratio), speedup.get("high", ratio)
    if speedup["verdict"] == "no difference":
        return f"none ({times(ratio)} [{ratio_text(low)}-{ratio_text(high)}])"
    if ratio < 1:
        low, high = 1 / high, 1 / low
    return f"{faster(ratio)} [{ratio_text(low)}-{ratio_text(high)}]"


def times(ratio: float) -> str:
    """`ratio` as text: "1.80x"."""
    return f"{ratio_text(ratio)}x"


def metric_change(run: Run, before: Row, after: Row) -> str:
    """Difference of the metric between two rows, and whether it is better or worse."""
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
    """The whole run in one sentence: metric before and after, size ratio, speed-up."""
    first, last = run["rows"][0], run["rows"][-1]
    metric, unit, runtime = run["metric"]["name"], run["metric"]["unit"], run["target"]["runtime"]
    old, new = value_of(metric_entry(run, first)), value_of(metric_entry(run, last))
    if old is None or new is None:
        clauses = [f"{metric} on {reported_split(run)} was not measured"]
    else:
        clauses = [
            f"{metric} on {reported_split(run)} goes from {with_unit(metric_text(old, unit), unit)} to "
            f"{with_unit(metric_text(new, unit), unit)} ({metric_change(run, first, last)})"
        ]
    before, after = value_of(first["size_bytes"]), value_of(last["size_bytes"])
    if before is None or after is None:
        clauses.append("its size was not measured")
    else:
        change = smaller(before, after)
        clauses.append("the artifact is as large as before" if change == "none" else f"the artifact is {change}")
    speedup = last["speedup"]["over_baseline"]
    if not is_measured(speedup):
        clauses.append(f"its latency on {runtime} was not measured")
    elif speedup["verdict"] == "no difference":
        clauses.append(f"its latency on {runtime} shows no difference")
    else:
        clauses.append(f"it runs {faster(speedup['value'])} on {runtime}")
    return f"{clauses[0]}; {clauses[1]}, and {clauses[2]}."


def layers(run: Run) -> list[Layer]:
    """One `Layer` for each changed layer, in the order in which steps changed them; later steps replace figures."""
    by_name: dict[str, Layer] = {}
    for label, row in zip(labels(run["rows"]), run["rows"], strict=True):
        for record in row["layers"]:
            if not record["layer"]:
                continue  # a record of the whole model
            # pruning names the parameter, quantization its module: merge them
            name = record["layer"].removesuffix(".weight")
            layer = by_name.setdefault(name, Layer(name=name))
            for key in ("sparsity", "weight_bits", "activation_bits", "sqnr_db", "kernel", "integer"):
                if (value := record.get(key)) not in (None, ""):
                    setattr(layer, key, value)
            note = (label, record["action"], record["reason"])
            if (record["reason"] or record["action"] == "refused") and note not in layer.notes:
                layer.notes.append(note)
    return list(by_name.values())


def ceilings(run: Run) -> list[Ceiling]:
    """Predicted and measured latencies, one `Ceiling` for each round."""
    rounds = []
    for label, row in zip(labels(run["rows"]), run["rows"], strict=True):
        cuts = row.get("evidence", {}).get("latency", [])
        for cut_number, cut in enumerate(cuts, 1):
            about = f"times of {cut['programs']} narrowed programs, taken {_taken(cut['elsewhere'])}"
            rounds += [
                Ceiling(
                    label=f"{label}, cut {cut_number}" if len(cuts) > 1 else label,
                    round=number,
                    ceiling=cut["ceiling"],
                    predicted=attempt["predicted"],
                    measured=attempt["measured"],
                    chosen=number == cut["best"],
                    about=about,
                )
                for number, attempt in enumerate(cut["rounds"], 1)
            ]
    return rounds


def elsewhere(run: Run) -> list[str]:
    """A line for every row that was timed on another machine."""
    lines = []
    for label, row in zip(labels(run["rows"]), run["rows"], strict=True):
        for machine, found in row.get("elsewhere", {}).items():
            latency, ratio = found["latency_ms"], found["over_baseline"]
            low, high = map(significant, (latency.get("low", latency["value"]), latency.get("high", latency["value"])))
            gain = ""
            if is_measured(ratio) and row["kind"] != "baseline":
                same = ratio["verdict"] == "no difference"
                gain = ", no difference to" if same else f", {faster(ratio['value'])} than"
                gain = f"{gain} the baseline there"
            lines.append(f"{label} on {machine}: {significant(latency['value'])} ms [{low}-{high}]{gain}")
    return lines


def choices_by_latency(run: Run) -> list[str]:
    """A line for every program of which layers were chosen by their latency."""
    lines = []
    for label, row in zip(labels(run["rows"]), run["rows"], strict=True):
        for part, found in row.get("evidence", {}).get("faster_in_float", {}).items():
            of = f", part {part}" if part else ""
            chosen, floats, integers = (
                "not deployed" if ms is None else f"{significant(ms)} ms"
                for ms in (found["latency_ms"], found["float_ms"], found["integer_ms"])
            )
            lines.append(
                f"{label}{of}: {found['in_float']} of {found['layers']} layers stay in float, where the model is "
                f"faster: {chosen}; all on integers {integers}, all in float {floats} "
                f"({found['programs']} programs timed)"
            )
    return lines


def _taken(elsewhere: str) -> str:
    return f"on {elsewhere}" if elsewhere else "on this machine"
