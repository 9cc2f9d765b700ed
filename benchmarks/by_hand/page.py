"""The page of the comparison with pipelines by hand, from its rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.by_hand.paired import LEVEL, Difference, difference, unpacked
from benchmarks.rows import Row
from torchslim.artifact.latency import Timings
from torchslim.report.numbers import sized

OURS, FLOAT, TIMED = "torchslim", "float", "latency"
SHARE = 3  # of the lines of the shortest other side, one in so many
EVEN = 1.05  # times another side's latency that still count as equal: paired medians of a busy machine are no finer
ABOUT = """\
Three jobs of the [gallery](../examples): images, sentences and series. Every side starts from the same trained model
and the same data, selects on val, and makes an ONNX file; one program measures all files on ONNX Runtime with one
thread. *By hand* is a pipeline of several libraries, and *fasterai* the library that covers most of a pipeline, both
written as their guides show it, in [by_hand/](by_hand). Images are trained on 4,000 samples in 4 epochs by every side;
sentences and series are trained by none.

- *metric*: accuracy on test, the mean over the seeds, with the lowest and the highest in brackets;
- *latency*: milliseconds of one sample on the processor, without the time that other work took: eight samples a round,
  all files of a job in every round, in random order; the median;
- *ratio*: torchslim's latency over that side's in the same round, the median with the 10th and 90th percentile;
- *lines*: code of the side's script, imports included, without blank lines, comments, docstrings, and imports and
  aliases that only annotations need. Every script is given the same model, loaders and baseline;
- *minutes*: of making the file on this machine, which other work shared{load}; torchslim's contain
  its checks and its own measurements."""

BAR = f"""\
Torchslim's accuracy must not be worse, its latency must be less or equal (a median ratio of at most {EVEN:g}), with a
third of the lines.

*Accuracy* is torchslim's minus the other side's, in percentage points. A small difference may be chance, so an exact
paired test compares the sides sample by sample: *p* is the probability of a difference of this size, up or down, if
both sides are equally good. It is counted over the signs of all samples that differ, with the seeds averaged on each
sample; for one seed this is McNemar's test. With p at most {LEVEL:g} torchslim is *better* or *worse*, otherwise *equal
within error*. That is no proof of equality: no difference counts before six samples differ. The test speaks of these
files on other samples, not of other seeds."""


def latest(rows: Iterable[Row]) -> dict[tuple[str, int, str], Row]:
    """The newest row of every job, seed and side."""
    return {(row["job"], row["seed"], row["side"]): row for row in rows}


def of_side(rows: Mapping[tuple[str, int, str], Row], job: str, side: str) -> list[Row]:
    """Rows of a side that count, by seed."""
    found = [row for (name, _, who), row in sorted(rows.items()) if (name, who) == (job, side)]
    return [row for row in found if not row["reason"]]


def timings(rows: Mapping[tuple[str, int, str], Row], job: str) -> Timings:
    """The rounds of all seeds together, of the sides that all seeds have."""
    every = [row["rounds"] for row in of_side(rows, job, TIMED)]
    sides = [side for side in every[0] if all(side in rounds for rounds in every)] if every else []
    return Timings({side: [value for rounds in every for value in rounds[side]] for side in sides})


def mean(rows: Sequence[Row], key: str) -> float:
    """The mean over the seeds."""
    return statistics.fmean(row[key] for row in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What torchslim's side reaches against another side.

    Args:
        accuracy: the difference on test; None if a row does not tell which samples are right.
        points: that difference as it is, torchslim's mean minus the other side's.
        misses: bars that torchslim's side misses, in words; empty if it meets all.
    """

    accuracy: Difference | None
    points: float
    misses: Sequence[str]


def verdicts(rows: Mapping[tuple[str, int, str], Row], job: str) -> dict[str, Verdict]:
    """The verdict against every other side."""
    ours, timed = of_side(rows, job, OURS), timings(rows, job)
    found: dict[str, Verdict] = {}
    others = dict.fromkeys(side for name, _, side in rows if name == job and side not in (OURS, TIMED))
    for side in others:
        theirs = of_side(rows, job, side)
        if not ours or not theirs or OURS not in timed.rounds or side not in timed.rounds:
            continue
        misses = []
        accuracy, points = paired(ours, theirs), mean(ours, "test") - mean(theirs, "test")
        if points < 0 and (accuracy is None or accuracy.verdict == "worse"):
            misses.append(f"{-points:.2f} points less")
        if (ratio := timed.speedup(side, OURS).value) > EVEN:
            misses.append(f"{ratio:.2f} times the latency")
        if SHARE * ours[-1]["lines"] > theirs[-1]["lines"]:
            misses.append(f"{ours[-1]['lines']} lines against {theirs[-1]['lines']}")
        found[side] = Verdict(accuracy=accuracy, points=points, misses=misses)
    return found


def paired(ours: Iterable[Row], theirs: Iterable[Row]) -> Difference | None:
    """The difference on the same samples over the seeds that both sides have."""
    pairs = [(a, b) for a in ours for b in theirs if a["seed"] == b["seed"]]
    if not pairs or any("hits" not in row for pair in pairs for row in pair):
        return None
    mine, other = ([unpacked(row["hits"], row["samples"]) for row in side] for side in zip(*pairs, strict=True))
    return difference(mine, other)


def page(rows: Iterable[Row]) -> str:
    """The Markdown page."""
    found = latest(rows)
    jobs = list(dict.fromkeys(job for job, _, _ in found))
    releases = dict(item for row in found.values() for item in row.get("versions", {}).items())
    loads = [row["load"] for row in found.values() if "load" in row]
    lines = [
        "# torchslim and what a user does by hand",
        "",
        "Written by `python -m benchmarks.by_hand`; "
        f"{', '.join(f'{name} {release}' for name, release in releases.items())}.",
        "",
        ABOUT.format(load=f" (load {min(loads):.0f} to {max(loads):.0f})" if loads else ""),
    ]
    for job in jobs:
        lines += ["", f"## {job.capitalize()}", "", _measured_on(found, job), "", *_table(found, job)]
    lines += ["", "## Bar", "", *_bar(found, jobs), "", "## What broke on the way", "", *_broke(found)]
    return "\n".join(lines) + "\n"


def _measured_on(rows: Mapping[tuple[str, int, str], Row], job: str) -> str:
    of_job = [row for (name, _, _), row in rows.items() if name == job]
    ours = dict.fromkeys(row["version"] for row in of_job if row["side"] in (OURS, TIMED))
    return f"Measured on {', '.join(dict.fromkeys(row['machine'] for row in of_job))}; torchslim {', '.join(ours)}."


def _table(rows: Mapping[tuple[str, int, str], Row], job: str) -> list[str]:
    timed = timings(rows, job)
    lines = [
        "| side | metric | bytes | latency, ms | ratio | minutes | lines | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    sides = dict.fromkeys([FLOAT, *(side for name, _, side in rows if name == job and side != TIMED)])
    for side in sides:
        mine = of_side(rows, job, TIMED if side == FLOAT else side)
        if not mine:
            reason = next(row["reason"] for (name, _, who), row in rows.items() if (name, who) == (job, side))
            lines.append(f"| {side} | {_cell(reason)} | | | | | | |")
            continue
        tests = [row["test"] for row in mine]
        spread = f" [{min(tests):.2f}-{max(tests):.2f}]" if max(tests) > min(tests) else ""
        cells = [side, f"{mean(mine, 'test'):.2f} %{spread}", sized(round(mean(mine, "bytes")))]
        cells += [f"{timed.latency(side).value:.3f}" if side in timed.rounds else "-", _ratio(timed, side)]
        if side == FLOAT:
            cells += ["", "", ""]
        else:
            cells += [f"{mean(mine, 'minutes'):.1f}", str(mine[-1]["lines"]), str(len(mine))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio(timed: Timings, side: str) -> str:
    if side == OURS or not {side, OURS} <= timed.rounds.keys():
        return ""
    ratio = timed.speedup(side, OURS)
    return f"{ratio.value:.2f} [{ratio.p10:.2f}-{ratio.p90:.2f}]"


def _bar(rows: Mapping[tuple[str, int, str], Row], jobs: Sequence[str]) -> list[str]:
    lines = [
        BAR,
        "",
        "| job | against | accuracy, points | paired test | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for job in jobs:
        for side, verdict in verdicts(rows, job).items():
            outcome = f"**missed**: {'; '.join(verdict.misses)}" if verdict.misses else "met"
            lines.append(f"| {job} | {side} | {verdict.points:+.2f} | {_tested(verdict.accuracy)} | {outcome} |")
    return lines


def _tested(accuracy: Difference | None) -> str:
    if accuracy is None:
        return "not tested: its rows do not tell which samples are right"
    digits = f"{accuracy.p:.2f}" if accuracy.p >= 0.1 else f"{accuracy.p:.1g}"
    return f"{accuracy.verdict} ({accuracy.differ} of {accuracy.samples:,} samples differ, p = {digits})"


def _broke(rows: Mapping[tuple[str, int, str], Row]) -> list[str]:
    lines = ["| job | side | tried, as a guide shows it | result |", "| --- | --- | --- | --- |"]
    for (job, _, side), row in rows.items():
        attempts = list(row.get("tried", []))
        if row["reason"]:
            attempts.append({"what": f"the pipeline, seed {row['seed']}", "error": row["reason"]})
        lines += [f"| {job} | {side} | {_cell(entry['what'])} | {_cell(entry['error'])} |" for entry in attempts]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
