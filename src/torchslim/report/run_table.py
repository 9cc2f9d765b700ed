"""Show a run as plain text: an aligned table, and findings below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from torchslim.report.findings import (
    batch_words,
    ceilings,
    choices_by_latency,
    elsewhere,
    gains,
    gaps,
    labels,
    latency_entry,
    metric_entry,
    part_latencies,
    provenance,
    reported_split,
    time_words,
    times,
    warnings,
)
from torchslim.report.numbers import (
    counted,
    is_measured,
    metric_text,
    significant,
    sized,
    spread,
    value_of,
    with_unit,
)
from torchslim.report.records import Entry, NotMeasured, Row, Run

NAME_WIDTH = 20
ABSENT = "-"


def table(run: dict[str, Any]) -> str:
    """The run as a plain-text table: a row for each step and for the artifact, and the gain of every step alone.

    Args:
        run: content of `run.json`.
    """
    return _table(cast("Run", run))


def _table(run: Run) -> str:
    """The lines of the table, with gains, ceilings, gaps and warnings below."""
    rows, runtime, metric = run["rows"], run["target"]["runtime"], run["metric"]
    names = labels(rows)
    compared = runtime != "eager"
    better = "higher" if metric.get("higher_is_better", True) else "lower"
    headers = [
        ("step", ""),
        (_clip(metric["name"], 14), with_unit(reported_split(run) + ",", metric["unit"]).removesuffix(",")),
        ("non-zero", "parameters"),
        ("MACs", "a sample" if run["batch"] == 1 else "a call"),
        ("size", ""),
        (f"latency on {_clip(runtime, 16)}", "median [p10-p90]"),
        ("speed-up", "over baseline"),
    ] + ([("eager", "median")] if compared else [])
    if "sizes" in run:
        headers += [("latency at the", "largest size"), ("speed-up at the", "largest size")]
    cells = [
        [_clip(name, NAME_WIDTH), *_cells(run, row), *([_eager(row)] if compared else []), *_largest(run, row)]
        for name, row in zip(names, rows, strict=True)
    ]
    lines = [
        f"{plain(metric['name'])} on {reported_split(run)} ({better} is better); latency of "
        f"{plain(batch_words(run))}, {_rounds(run)}",
        "",
        *aligned(headers, cells),
        "",
        "gain of each step alone [p10-p90]:",
        *_gain_lines(run),
        *_part_lines(run),
        *_ceiling_lines(run),
        *_listed("layers chosen by latency", choices_by_latency(run)),
        *_listed("latency on other machines", elsewhere(run)),
    ]
    missing = gaps(run, _shown(run))
    lines += ["", *[f"not measured ({ABSENT}): {plain(gap)}" for gap in missing]]
    lines += [f"warning ({plain(', '.join(steps))}): {plain(text)}" for text, steps in warnings(run)]
    lines += [plain(time_words(run))] if time_words(run) else []
    return "\n".join([*lines, provenance(run)])


def plain(text: str) -> str:
    """`text` on one line, with spaces in place of unprintable characters, which a terminal might obey."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def _clip(text: str, width: int) -> str:
    text = plain(text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def aligned(headers: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> list[str]:
    """Two header lines, a rule and the rows; the first column is aligned to the left, the others to the right."""
    columns = list(zip(*headers, strict=True)) + list(rows)
    widths = [max(len(line[index]) for line in columns) for index in range(len(headers))]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in columns
    ]
    rule = "  ".join("-" * width for width in widths)
    return [line.rstrip() for line in (*lines[:2], rule, *lines[2:])]


def _cells(run: Run, row: Row) -> list[str]:
    metric, size, macs = value_of(metric_entry(run, row)), value_of(row["size_bytes"]), value_of(row["macs"])
    nonzero, total = value_of(row["nonzero"]), value_of(row["parameters"])
    return [
        ABSENT if metric is None else metric_text(metric, run["metric"]["unit"]),
        " / ".join(ABSENT if count is None else counted(count) for count in (nonzero, total)),
        ABSENT if macs is None else counted(macs),
        ABSENT if size is None else sized(size),
        _latency(latency_entry(run, row)),
        _speedup(row),
    ]


def _latency(entry: Entry) -> str:
    if not is_measured(entry):
        return ABSENT
    median, low, high = spread(entry)
    return f"{median} [{low}-{high}] ms"


def _largest(run: Run, row: Row) -> list[str]:
    """Cells of the largest inputs; none where sizes do not vary."""
    if "sizes" not in run:
        return []
    return [_latency(latency_entry(run, row, largest=True)), _speedup(row, "speedup_largest")]


def _speedup(row: Row, figure: Literal["speedup", "speedup_largest"] = "speedup") -> str:
    entry = row[figure]["over_baseline"]
    if not is_measured(entry):
        return ABSENT
    if row["kind"] == "baseline":
        return times(entry["value"])
    verdict = entry["verdict"]
    return verdict if verdict == "no difference" else f"{times(entry['value'])} {verdict}"


def _eager(row: Row) -> str:
    entry = row["latency_ms"].get("eager", NotMeasured(not_measured=""))
    return f"{spread(entry)[0]} ms" if is_measured(entry) else ABSENT


def _rounds(run: Run) -> str:
    repeats = sorted(
        {entry["repeats"] for row in run["rows"] for entry in row["latency_ms"].values() if is_measured(entry)}
    )
    if not repeats:
        return "not measured"
    return f"{'-'.join(str(count) for count in dict.fromkeys((repeats[0], repeats[-1])))} interleaved rounds"


def _gain_lines(run: Run) -> list[str]:
    step_gains = gains(run)
    if not step_gains:
        return ["  no step was taken"]
    lines = [
        (
            _clip(gain.label, NAME_WIDTH),
            f"size {gain.size}",
            f"latency {gain.latency}",
            f"metric {gain.metric}",
        )
        for gain in step_gains
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  " + "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]


def _part_lines(run: Run) -> list[str]:
    lines = part_latencies(run)
    return (
        ["", f"latency of parts on {_clip(run['target']['runtime'], 16)}:", *(f"  {plain(line)}" for line in lines)]
        if lines
        else []
    )


def _ceiling_lines(run: Run) -> list[str]:
    rounds = ceilings(run)
    if not rounds:
        return []
    lines = [
        (
            f"{_clip(attempt.label, NAME_WIDTH)}, round {attempt.round}",
            f"at most {significant(attempt.ceiling)}",
            f"predicted {significant(attempt.predicted)}",
            f"measured {ABSENT}" if attempt.measured is None else f"measured {significant(attempt.measured)}",
            "" if attempt.share is None else f"{significant(attempt.share)} of the ceiling",
            "taken" if attempt.chosen else "",
        )
        for attempt in rounds
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "",
        "latency, over that of the model that the step received; "
        f"{plain('; '.join(dict.fromkeys(attempt.about for attempt in rounds)))}:",
        *(
            "  " + "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ),
    ]


def _listed(heading: str, lines: Sequence[str]) -> list[str]:
    return ["", f"{heading}:", *(f"  {plain(line)}" for line in lines)] if lines else []


def _shown(run: Run) -> list[tuple[str, str, Entry]]:
    """All entries that the table shows, with label and name."""
    runtime = run["target"]["runtime"]
    entries: list[tuple[str, str, Entry]] = []
    for label, row in zip(labels(run["rows"]), run["rows"], strict=True):
        entries += [
            (label, run["metric"]["name"], metric_entry(run, row)),
            (label, "non-zero parameters", row["nonzero"]),
            (label, "parameters", row["parameters"]),
            (label, "MACs", row["macs"]),
            (label, "size", row["size_bytes"]),
            (label, "latency", latency_entry(run, row)),
            (label, "speed-up", row["speedup"]["over_baseline"]),
        ]
        if "sizes" in run:
            entries += [
                (label, "latency at the largest size", latency_entry(run, row, largest=True)),
                (label, "speed-up at the largest size", row["speedup_largest"]["over_baseline"]),
            ]
        if runtime != "eager" and "eager" in row["latency_ms"]:
            entries.append((label, "eager latency", row["latency_ms"]["eager"]))
    return entries
