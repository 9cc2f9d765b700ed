"""The page of the distillation benchmark, from its rows alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.distill_models import COUPLES, LABELS, TRIED
from benchmarks.rows import Row

COMMAND = "python -m benchmarks.distill"
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # two-sided 95 % quantile of Student's t, by degrees of freedom
TRIAL_SEED = 100


def page(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """Markdown."""
    latest = {(row["couple"], row["way"], row["seed"]): row for row in rows}
    lines = [
        "# What distillation brings, and what it costs",
        "",
        f"Written by `{COMMAND}`; {machine['processor']} ({machine['instruction_set']}), one thread, torch"
        f" {machine['versions']['torch']}. *Over labels alone* is the mean of the differences of equal seeds, with its",
        "95 % t-interval. Every loss has the weight that it comes with; nothing is chosen on test.",
    ]
    for couple, about in COUPLES.items():
        mine = [row for (name, *_), row in latest.items() if name == couple]
        if mine:
            lines += ["", f"## {couple.capitalize()}", "", f"{about.about[0].upper()}{about.about[1:]}.", ""]
            lines += _couple(mine)
    memory = [row for (name, *_), row in latest.items() if name == "memory"]
    if memory:
        lines += ["", "## Memory of all triples", "", "What RKD's angles and their gradient add to the peak of a", ""]
        lines[-2] += " process, beside a tensor of all triples in float32."
        lines += ["| batch | MiB | MiB of batch^3 |", "| --- | --- | --- |"]
        for row in memory:
            batch = int(row["way"].split()[1])
            lines.append(f"| {batch} | {row['ratios'][0]:.1f} | {4 * batch**3 / 2**20:.0f} |")
    return "\n".join(lines) + "\n"


def _couple(rows: Sequence[Row]) -> list[str]:
    tried = {row["way"]: row["val"] for row in rows if row["seed"] == TRIAL_SEED}
    lines = []
    if set(tried) >= set(TRIED):
        best = max(TRIED, key=lambda name: tried[name])
        told = ", ".join(f"{name} {value:.2f}" for name, value in tried.items())
        lines += [f"KD's settings, chosen on validation with a seed of its own: {best} ({told}).", ""]
    trained: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "test" in row:
            trained.setdefault(row["way"], {})[row["seed"]] = row
    labels = trained.get(LABELS, {})
    if labels:
        lines += ["| way | seeds | validation % | test % | over labels alone, test |", "| --- " * 5 + "|"]
        for way, found in sorted(trained.items(), key=lambda item: (-len(item[1]), -_mean(item[1], "val"))):
            lines.append(
                f"| {way} | {len(found)} | {_spread(found, 'val')} | {_spread(found, 'test')} | "
                f"{'-' if way == LABELS else interval(_differences(found, labels))} |"
            )
        lines += ["", _verdict(trained)]
    costs = [row for row in rows if row["way"].startswith("cost of ")]
    if costs:
        lines += ["", "A step, on one batch, in paired rounds:", "", "| way | over | median [p10-p90] | bar | |"]
        lines[-1] = "| way | over | median [p10-p90] | bar | verdict | over a step on labels alone |"
        lines += ["| --- " * 6 + "|"]
        for row in costs:
            ratios = sorted(row["ratios"])
            middle = statistics.median(ratios)
            spread = f"[{ratios[len(ratios) // 10]:.2f}-{ratios[-1 - len(ratios) // 10]:.2f}]"
            verdict = "met" if middle <= row["bar"] else "**missed**"
            lines.append(
                f"| {row['way'].removeprefix('cost of ')} | {row['over']} | {middle:.2f}x {spread} | "
                f"{row['bar']:.2f} | {verdict} | {statistics.median(row['over_labels']):.2f}x |"
            )
    return lines


def interval(differences: Sequence[float]) -> str:
    """The mean with its 95 % t-interval, in points."""
    mean = statistics.fmean(differences)
    half = half_width(differences)
    return f"{mean:+.2f}" if half is None else f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def half_width(differences: Sequence[float]) -> float | None:
    """Half of the interval's width; None for one difference."""
    count = len(differences)
    return T_95[count - 1] * statistics.stdev(differences) / math.sqrt(count) if count > 1 else None


def _verdict(trained: dict[str, dict[int, Row]]) -> str:
    differences = _differences(trained.get("kd", {}), trained[LABELS])
    half = half_width(differences) if differences else None
    if half is None or len(differences) < 5:
        return f"KD over labels alone: {len(differences)} of 5 seeds have run."
    above = statistics.fmean(differences) - half > 0
    verdict = "met" if above else "**missed**"
    return f"Bar: KD over labels alone, paired over 5 seeds, has a 95 % t-interval above zero: {verdict}."


def _differences(found: dict[int, Row], labels: dict[int, Row]) -> list[float]:
    return [found[seed]["test"] - labels[seed]["test"] for seed in sorted(found) if seed in labels]


def _mean(found: dict[int, Row], split: str) -> float:
    return statistics.fmean(row[split] for row in found.values())


def _spread(found: dict[int, Row], split: str) -> str:
    values = [row[split] for row in found.values()]
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"
