"""The page of the accuracy benchmark, from its rows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.accuracy_models import SUBJECTS
from benchmarks.rows import Row

COMMAND = "python -m benchmarks.accuracy"
INT8, INT4, SAME = 0.3, 1.0, 0.2  # points: the bars
EPSILON = 1e-9  # a bar that is reached exactly is met


class Found:
    """The rows by model and way; of two rows with one seed the newest counts."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {(row["model"], row["way"], row["seed"]): row for row in rows}

    def of(self, model: str, way: str) -> list[Row]:
        """The rows of every seed that ran and ended well."""
        rows = [self.rows.get((model, way, seed)) for seed in SUBJECTS[model].seeds(way)]
        return [row for row in rows if row and not row["reason"]]

    def label(self, model: str, way: str) -> str:
        """The way, and how many of its seeds have run where some have not."""
        ran, all_seeds = len(self.of(model, way)), len(list(SUBJECTS[model].seeds(way)))
        return way if ran in (0, all_seeds) else f"{way} ({ran} of {all_seeds} seeds)"

    def mean(self, model: str, way: str, what: str) -> float | None:
        """Over the seeds; None where a row, or what is asked of it, is missing."""
        values = [row.get(what) for row in self.of(model, way)]
        return mean(value for value in values if value is not None) if values and None not in values else None

    def lost(self, model: str, way: str, what: str = "test") -> float | None:
        """Points below the float model on the same split, paired by seed."""
        split = "test" if what == "test_runtime" else what
        rows = self.of(model, way)
        floats = {row["seed"]: row[split] for row in self.of(model, "float")}
        if not rows or not floats or any(what not in row for row in rows):
            return None
        return mean(floats.get(row["seed"], floats[min(floats)]) - row[what] for row in rows)

    def best(self, model: str, ways: Sequence[str]) -> str | None:
        """The way with the highest accuracy on validation, by SQNR on validation where that is equal."""
        values = {way: self.mean(model, way, "val") for way in ways}
        known = [way for way in ways if values[way] is not None]
        return max(known, key=lambda way: (values[way], self.mean(model, way, "sqnr_val") or 0), default=None)


def page(rows: Iterable[Row], machine: dict[str, Any]) -> str:
    """The Markdown page, from the rows and the machine alone."""
    found = Found(rows)
    versions = Counter(row["version"] for row in found.rows.values())
    lines = [
        "# What quantization costs in accuracy",
        "",
        f"Written by `{COMMAND}`; {machine['processor']} ({machine['instruction_set']}), torch"
        f" {machine['versions']['torch']}; torchslim "
        + ", ".join(f"{name} ({number} rows)" for name, number in sorted(versions.items()))
        + ".",
        "Trained models, quantized for ONNX Runtime; what is measured is the converted model, run by PyTorch, and",
        "where it says so by ONNX Runtime. *Lost* is in points on test, against the float model (the one of the same",
        "seed where the model is trained here). SQNR and cosine are of the outputs against the float model's, on",
        "validation. Whatever is chosen is chosen on validation; test never selects.",
        "",
        "## Bars",
        "",
        "| bar | way | measured | verdict |",
        "| --- | --- | --- | --- |",
        *(f"| {bar.bar} | {bar.way} | {bar.measured} | {bar.verdict} |" for bar in bars(found)),
        "",
        "## What helps int8",
        "",
        *_helpers(found),
    ]
    for model in SUBJECTS:
        lines += ["", f"## {model.capitalize()}", "", *_section(found, model)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Bar:
    """A line of the verdict."""

    bar: str
    way: str
    measured: str
    verdict: str


def bars(found: Found) -> list[Bar]:
    """Every bar, with what was measured."""
    lines = []
    static = [way for way in SUBJECTS["images"].ways if way == "int8" or way.startswith(("int8,", "int8 +"))]
    sentences = [way for way in SUBJECTS["sentences"].ways if way == "int8" or way.startswith(("int8,", "int8 +"))]
    chosen = {
        "images": ["int8", found.best("images", [way for way in static if "qat" not in way]), "int8, qat"],
        "sentences": ["int8", found.best("sentences", sentences), "int8-dynamic"],
        "series": ["int8-dynamic"],
    }
    for model, ways in chosen.items():
        for way in dict.fromkeys(way for way in ways if way):
            for what, where in (("test", ""), ("test_runtime", ", on ONNX Runtime")):
                if what == "test" or found.mean(model, way, what) is not None:
                    lost, label = found.lost(model, way, what), found.label(model, way) + where
                    lines.append(_limit(f"int8 loses at most {INT8} points", model, label, lost, INT8))
    four = [
        way for way in SUBJECTS["images"].ways if way.startswith("int4-weights") and ("gptq" in way or "qat" in way)
    ]
    for model, ways in (("images", four), ("sentences", ["int4-weights + gptq"])):
        for way in dict.fromkeys(way for way in (*ways, found.best(model, ways)) if way):
            lost, label = found.lost(model, way), found.label(model, way)
            lines.append(_limit(f"int4 weights lose at most {INT4} point", model, label, lost, INT4))
    for way in SUBJECTS["images"].ways:
        if "qat" in way:
            rows = found.of("images", way)
            apart = max((abs(row["val"] - row["val_trained"]) for row in rows), default=None)
            what = f"converted within {SAME} points of what was trained, every seed"
            lines.append(_limit(what, "images", found.label("images", way), apart, SAME))
    return lines


def _limit(bar: str, model: str, way: str, value: float | None, limit: float) -> Bar:
    if value is None:
        return Bar(bar, f"{model}: {way}", "not measured", "-")
    verdict = "met" if value <= limit + EPSILON else "**missed**"
    return Bar(bar, f"{model}: {way}", f"{value:+.2f}", verdict)


def _helpers(found: Found) -> list[str]:
    lines = [
        "Against plain `int8` of the same model, on validation: points of accuracy, and dB of the outputs.",
        "",
        "| helper | " + " | ".join(f"{model}, points | {model}, dB" for model in ("images", "sentences")) + " |",
        "| --- | --- | --- | --- | --- |",
    ]
    names = [way for model in ("images", "sentences") for way in SUBJECTS[model].ways]
    for way in dict.fromkeys(way for way in names if way.startswith(("int8 +", "int8,")) and "qat" not in way):
        cells = []
        for model in ("images", "sentences"):
            for what in ("val", "sqnr_val"):
                before = found.mean(model, "int8", what)
                after = found.mean(model, way, what) if way in SUBJECTS[model].ways else None
                cells.append("-" if before is None or after is None else f"{after - before:+.2f}")
        lines.append(f"| {way.removeprefix('int8').lstrip(' +,')} | {' | '.join(cells)} |")
    return lines


def _section(found: Found, model: str) -> list[str]:
    lines = [
        f"{SUBJECTS[model].about[0].upper()}{SUBJECTS[model].about[1:]}.",
        "",
        "| way | seeds | validation % | test % | lost | SQNR dB | cosine | test % on ONNX Runtime | seconds |",
        "| --- " * 9 + "|",
    ]
    notes = {}
    for way in SUBJECTS[model].ways:
        rows = found.of(model, way)
        if not rows:
            failed = [
                row["reason"] for (a, b, _), row in found.rows.items() if (a, b) == (model, way) and row["reason"]
            ]
            lines.append(f"| `{way}` | - | {(failed or ['not measured'])[0]} |" + " - |" * 6)
            continue
        notes |= {note: way for row in rows for note in row.get("notes", ())}
        cells = [_spread([row["val"] for row in rows]), _spread([row["test"] for row in rows])]
        cells.append("-" if way == "float" else f"{found.lost(model, way) or 0:+.2f}")
        for what, digits in (("sqnr_val", 1), ("cosine_val", 4), ("test_runtime", 2), ("seconds", 1)):
            value = found.mean(model, way, what)
            cells.append("-" if value is None or way == "float" else f"{value:.{digits}f}")
        lines.append(f"| `{way}` | {len(rows)} | {' | '.join(cells)} |")
    ways = {note: [way for way in SUBJECTS[model].ways if _said(found, model, way, note)] for note in notes}
    if ways:
        lines.append("")
    return lines + [f"- {', '.join(f'`{way}`' for way in said)}: {note}" for note, said in ways.items()]


def _said(found: Found, model: str, way: str, note: str) -> bool:
    return any(note in row.get("notes", ()) for row in found.of(model, way))


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} +- {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
